// Dot products of LENGTH pairs of minifloats, a pair per beat: x in the lowest bits, w above.
module minifloat_dot #(
    parameter LENGTH = 1,
    parameter X_EXPONENT = 2,
    parameter X_MANTISSA = 1,
    parameter W_EXPONENT = 2,
    parameter W_MANTISSA = 1,
    parameter A_BITS = 16,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [X_EXPONENT+X_MANTISSA:0] a_data,
    input b_valid,
    output b_ready,
    input [W_EXPONENT+W_MANTISSA:0] b_data,
    output m_valid,
    input m_ready,
    output [A_BITS-1:0] m_data
);
  localparam B = LENGTH > 1 ? $clog2(LENGTH) : 1;
  reg [B-1:0] at;
  reg [3:1] last;
  wire room;
  wire ends = at == LENGTH - 1;
  wire ready = room | ~ends;
  wire go = ready & a_valid & b_valid;
  assign a_ready = ready & b_valid;
  assign b_ready = ready & a_valid;
  always @(posedge clk) begin
    last <= {last, go & ends};
    if (go) at <= ends ? {B{1'b0}} : at + 1'b1;
    if (rst) begin
      last <= 0;
      at <= 0;
    end
  end

  wire [A_BITS-1:0] sum;
  minifloat_mac #(
      .X_EXPONENT(X_EXPONENT),
      .X_MANTISSA(X_MANTISSA),
      .W_EXPONENT(W_EXPONENT),
      .W_MANTISSA(W_MANTISSA),
      .A_BITS(A_BITS)
  ) mac (
      .clk(clk),
      .valid(go),
      .first(at == 0),
      .x(a_data),
      .w(b_data),
      .a(sum)
  );

  credit_fifo #(
      .WIDTH(A_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & ends),
      .push(last[3]),
      .push_data(sum),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
