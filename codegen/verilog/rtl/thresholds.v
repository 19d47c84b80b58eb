// y = LOW + the number of thresholds that a reaches, of PE sums at once: requantization to few bits without a multiplier.
//
// A binary search, one bit of the count and one comparison per cycle: stage i knows the upper i bits and compares with the threshold
// in the middle of what is left. TABLE holds, from its lowest bits on, the 2^BITS - 1 ascending thresholds of every channel.
module thresholds #(
    parameter PE = 1,
    parameter COLUMNS = 1,  // channels of a PE, one after the other
    parameter A_BITS = 16,
    parameter T_BITS = 17,  // of a threshold, signed
    parameter BITS = 4,
    parameter Y_BITS = 4,
    parameter signed [31:0] LOW = -8,
    parameter [COLUMNS*PE*((1<<BITS)-1)*T_BITS-1:0] TABLE = 0
) (
    input clk,
    input rst,
    input valid,
    input [PE*A_BITS-1:0] a,
    output [PE*Y_BITS-1:0] y
);
  localparam CB = COLUMNS > 1 ? $clog2(COLUMNS) : 1;
  localparam COUNT = (1 << BITS) - 1;

  // The column of the sums that enter; it travels with them.
  reg [CB-1:0] column;
  always @(posedge clk) begin
    if (valid) column <= column == COLUMNS - 1 ? {CB{1'b0}} : column + 1'b1;
    if (rst) column <= 0;
  end

  genvar p, i;
  generate
    for (i = 0; i < BITS; i = i + 1) begin : stage
      reg [PE*A_BITS-1:0] sums;
      reg [PE*BITS-1:0] counts;
      reg [CB-1:0] at;
      wire [PE*A_BITS-1:0] sums_in;
      wire [PE*BITS-1:0] counts_in;
      wire [CB-1:0] at_in;
      if (i == 0) begin : first
        assign sums_in = a;
        assign counts_in = 0;
        assign at_in = column;
      end else begin : later
        assign sums_in = stage[i-1].sums;
        assign counts_in = stage[i-1].counts;
        assign at_in = stage[i-1].at;
      end
      wire [PE*BITS-1:0] found;
      for (p = 0; p < PE; p = p + 1) begin : pe
        localparam MIDDLE = 1 << (BITS - 1 - i);  // the bit that is decided
        wire [BITS-1:0] known = counts_in[p*BITS+:BITS];
        wire signed [T_BITS-1:0] threshold = TABLE[((at_in*PE+p)*COUNT+known+MIDDLE-1)*T_BITS+:T_BITS];
        wire signed [A_BITS-1:0] sum = sums_in[p*A_BITS+:A_BITS];
        assign found[p*BITS+:BITS] = sum >= threshold ? known | MIDDLE : known;
      end
      always @(posedge clk) begin
        sums <= sums_in;
        counts <= found;
        at <= at_in;
      end
    end
    for (p = 0; p < PE; p = p + 1) begin : out
      wire [BITS-1:0] count = stage[BITS-1].counts[p*BITS+:BITS];
      assign y[p*Y_BITS+:Y_BITS] = LOW + count;
    end
  endgenerate
endmodule
