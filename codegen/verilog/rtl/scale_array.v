// Sums of PE columns become outputs: y = requantize(a), or by thresholds.
//
// Sums are whole at most once in TURNS cycles, so PE / TURNS units take them in turns: the first word of them at once, the others
// from a register that moves by a word per cycle; the outputs are collected until they are PE. `soon` announces whole sums a cycle
// ahead. `turn` asks for the multipliers of the next word, which come a cycle later. The outputs appear TURNS - 1 + the cycles of a
// unit after the sums; a cycle later if thresholds are searched in turns.
module scale_array #(
    parameter PE = 1,
    parameter TURNS = 1,   // divides PE
    parameter A_BITS = 16,
    parameter MULTIPLY = 1,
    parameter M_BITS = 16,
    parameter Q_BITS = 32,
    parameter SHIFT = 16,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter THRESHOLDS = 0,  // bits of a search among thresholds in the place of a multiplication, see thresholds.v
    parameter COLUMNS = 1,
    parameter T_BITS = 1,
    parameter [COLUMNS*PE*((1<<THRESHOLDS)-(THRESHOLDS?1:0))*T_BITS-1:0] TABLE = 0
) (
    input clk,
    input rst,
    input soon,
    input [PE*A_BITS-1:0] a,
    output turn,
    input [PE/TURNS*M_BITS-1:0] multiplier,
    output [PE*Y_BITS-1:0] y
);
  localparam UNITS = PE / TURNS;
  localparam AW = UNITS * A_BITS;
  localparam YW = UNITS * Y_BITS;

  reg valid;
  wire [AW-1:0] word;
  wire [YW-1:0] outputs;
  always @(posedge clk) valid <= soon & ~rst;

  genvar i;
  generate
    if (TURNS > 1) begin : share
      reg [TURNS-1:1] later;  // [i]: `soon` i cycles ago
      always @(posedge clk) begin
        later <= {later, soon};
        if (rst) later <= 0;
      end
      assign turn = soon | |later;
      for (i = 1; i < TURNS; i = i + 1) begin : place
        reg [AW-1:0] held;
        if (i == TURNS - 1) begin : last
          always @(posedge clk) held <= a[i*AW+:AW];
        end else begin : chain
          always @(posedge clk) held <= valid ? a[i*AW+:AW] : place[i+1].held;
        end
      end
      assign word = valid ? a[AW-1:0] : place[1].held;
      reg [(TURNS-1)*YW-1:0] collected;
      always @(posedge clk) collected <= {outputs, collected} >> YW;
      assign y = {outputs, collected};
    end else begin : direct
      assign turn = soon;
      assign word = a;
      assign y = outputs;
    end

    if (THRESHOLDS) begin : search
      wire [AW-1:0] searched;
      wire found;
      if (TURNS > 1) begin : late
        reg [AW-1:0] word_r;
        reg turn_r, turn_rr;
        always @(posedge clk) begin
          word_r <= word;
          turn_r <= turn & ~rst;
          turn_rr <= turn_r & ~rst;
        end
        assign searched = word_r;
        assign found = turn_rr;
      end else begin : now
        assign searched = word;
        assign found = valid;
      end
      thresholds #(
          .PE(UNITS),
          .COLUMNS(COLUMNS * TURNS),
          .A_BITS(A_BITS),
          .T_BITS(T_BITS),
          .BITS(THRESHOLDS),
          .Y_BITS(Y_BITS),
          .LOW(LOW),
          .TABLE(TABLE)
      ) unit (
          .clk(clk),
          .rst(rst),
          .valid(found),
          .a(searched),
          .y(outputs)
      );
    end else begin : scale
      for (i = 0; i < UNITS; i = i + 1) begin : pe
        requantize #(
            .A_BITS(A_BITS),
            .MULTIPLY(MULTIPLY),
            .M_BITS(M_BITS),
            .P_BITS(Q_BITS),
            .SHIFT(SHIFT),
            .ROUND(ROUND),
            .Y_BITS(Y_BITS),
            .CLAMP_LOW(CLAMP_LOW),
            .CLAMP_HIGH(CLAMP_HIGH),
            .LOW(LOW),
            .HIGH(HIGH)
        ) unit (
            .clk(clk),
            .a(word[i*A_BITS+:A_BITS]),
            .m(multiplier[i*M_BITS+:M_BITS]),
            .y(outputs[i*Y_BITS+:Y_BITS])
        );
      end
    end
  endgenerate
endmodule
