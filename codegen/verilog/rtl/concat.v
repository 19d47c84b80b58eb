// A_BEATS beats of a, then B_BEATS of b, and again.
module concat #(
    parameter PE = 1,
    parameter A_BITS = 8,
    parameter A_SIGNED = 1,
    parameter A_BEATS = 1,
    parameter B_BITS = 8,
    parameter B_SIGNED = 1,
    parameter B_BEATS = 1,
    parameter Y_BITS = 8,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [PE*A_BITS-1:0] a_data,
    input b_valid,
    output b_ready,
    input [PE*B_BITS-1:0] b_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam B = $clog2(A_BEATS + B_BEATS);
  reg [B-1:0] index;
  wire room;
  wire from_b = index >= A_BEATS;
  wire go = room & (from_b ? b_valid : a_valid);
  assign a_ready = room & ~from_b;
  assign b_ready = room & from_b;
  always @(posedge clk) begin
    if (go) index <= index == A_BEATS + B_BEATS - 1 ? {B{1'b0}} : index + 1'b1;
    if (rst) index <= 0;
  end

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [A_BITS:0] a = {A_SIGNED ? a_data[p*A_BITS+A_BITS-1] : 1'b0, a_data[p*A_BITS+:A_BITS]};
      wire signed [B_BITS:0] b = {B_SIGNED ? b_data[p*B_BITS+B_BITS-1] : 1'b0, b_data[p*B_BITS+:B_BITS]};
      wire signed [Y_BITS:0] wide_a = a, wide_b = b;
      assign y[p*Y_BITS+:Y_BITS] = from_b ? wide_b[Y_BITS-1:0] : wide_a[Y_BITS-1:0];
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(go),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
