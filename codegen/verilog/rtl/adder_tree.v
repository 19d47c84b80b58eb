// The sum of N signed numbers, one register after every level: $clog2(N) cycles. Sums grow by a bit per level, but never
// beyond LIMIT bits, which the caller knows to hold the final sum.
module adder_tree #(
    parameter N = 2,
    parameter WIDTH = 8,
    parameter LIMIT = 32
) (
    input clk,
    input [N*WIDTH-1:0] x,
    output signed [LIMIT-1:0] sum
);
  localparam PAIRS = (N + 1) / 2;
  localparam GROWN = WIDTH < LIMIT ? WIDTH + 1 : WIDTH;

  genvar i;
  generate
    if (N == 1) begin : leaf
      wire signed [WIDTH-1:0] only = x;
      assign sum = only;
    end else begin : level
      wire [PAIRS*GROWN-1:0] half;
      for (i = 0; i < PAIRS; i = i + 1) begin : pair
        wire signed [WIDTH-1:0] a = x[2*i*WIDTH+:WIDTH];
        reg signed [GROWN-1:0] s;
        if (2 * i + 1 < N) begin : two
          wire signed [WIDTH-1:0] b = x[(2*i+1)*WIDTH+:WIDTH];
          always @(posedge clk) s <= a + b;
        end else begin : one
          always @(posedge clk) s <= a;
        end
        assign half[i*GROWN+:GROWN] = s;
      end
      adder_tree #(
          .N(PAIRS),
          .WIDTH(GROWN),
          .LIMIT(LIMIT)
      ) rest (
          .clk(clk),
          .x(half),
          .sum(sum)
      );
    end
  endgenerate
endmodule
