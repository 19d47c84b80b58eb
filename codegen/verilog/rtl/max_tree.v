// The largest of N signed numbers, one register after every level: $clog2(N) cycles.
module max_tree #(
    parameter N = 2,
    parameter WIDTH = 8
) (
    input clk,
    input [N*WIDTH-1:0] x,
    output [WIDTH-1:0] largest
);
  localparam PAIRS = (N + 1) / 2;
  genvar i;
  generate
    if (N == 1) begin : leaf
      assign largest = x;
    end else begin : level
      wire [PAIRS*WIDTH-1:0] half;
      for (i = 0; i < PAIRS; i = i + 1) begin : pair
        wire signed [WIDTH-1:0] a = x[2*i*WIDTH+:WIDTH];
        reg signed [WIDTH-1:0] s;
        if (2 * i + 1 < N) begin : two
          wire signed [WIDTH-1:0] b = x[(2*i+1)*WIDTH+:WIDTH];
          always @(posedge clk) s <= a > b ? a : b;
        end else begin : one
          always @(posedge clk) s <= a;
        end
        assign half[i*WIDTH+:WIDTH] = s;
      end
      max_tree #(
          .N(PAIRS),
          .WIDTH(WIDTH)
      ) rest (
          .clk(clk),
          .x(half),
          .largest(largest)
      );
    end
  endgenerate
endmodule
