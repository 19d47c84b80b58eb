// The sum (MAXIMUM 0) or the largest (MAXIMUM 1) of every row of BEATS beats of PE elements.
module row_reduce #(
    parameter PE = 1,
    parameter BEATS = 1,
    parameter MAXIMUM = 0,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter A_BITS = 16,  // signed
    parameter Y_BITS = 16,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [PE*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [Y_BITS-1:0] m_data
);
  localparam TREE = 1 + $clog2(PE);  // cycles to the output of the tree
  localparam OUT = TREE + 1;
  localparam B = BEATS > 1 ? $clog2(BEATS) : 1;
  reg [B-1:0] beat;
  reg [OUT:1] valid, last;
  reg first;
  wire room;
  wire end_row = beat == BEATS - 1;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~end_row;
  always @(posedge clk) begin
    valid <= {valid, go};
    last <= {last, go & end_row};
    if (go) beat <= end_row ? {B{1'b0}} : beat + 1'b1;
    if (valid[TREE]) first <= last[TREE];
    if (rst) begin
      beat <= 0;
      valid <= 0;
      last <= 0;
      first <= 1'b1;
    end
  end

  reg [PE*(X_BITS+1)-1:0] x;
  wire signed [A_BITS-1:0] part;
  reg signed [A_BITS-1:0] accumulator;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      always @(posedge clk)
        x[p*(X_BITS+1)+:X_BITS+1] <= {X_SIGNED ? s_data[p*X_BITS+X_BITS-1] : 1'b0, s_data[p*X_BITS+:X_BITS]};
    end
    if (MAXIMUM) begin : maximum
      wire signed [X_BITS:0] largest;
      max_tree #(
          .N(PE),
          .WIDTH(X_BITS + 1)
      ) tree (
          .clk(clk),
          .x(x),
          .largest(largest)
      );
      assign part = largest;
      always @(posedge clk) if (valid[TREE] && (first || part > accumulator)) accumulator <= part;
    end else begin : sum
      adder_tree #(
          .N(PE),
          .WIDTH(X_BITS + 1),
          .LIMIT(A_BITS)
      ) tree (
          .clk(clk),
          .x(x),
          .sum(part)
      );
      always @(posedge clk) if (valid[TREE]) accumulator <= part + (first ? $signed({A_BITS{1'b0}}) : accumulator);
    end
  endgenerate

  credit_fifo #(
      .WIDTH(Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & end_row),
      .push(last[OUT]),
      .push_data(accumulator[Y_BITS-1:0]),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
