// Two channels, element by element:
//   PRODUCT 0   y = clamp(round_half_even((a * A_SCALE + b * B_SCALE) / 2^SHIFT))
//   PRODUCT 1   y = clamp(round_half_even(a * b * A_SCALE / 2^SHIFT))
module combine #(
    parameter PE = 1,
    parameter PRODUCT = 0,
    parameter A_BITS = 8,
    parameter A_SIGNED = 1,
    parameter B_BITS = 8,
    parameter B_SIGNED = 1,
    parameter signed [31:0] A_SCALE = 1,
    parameter signed [31:0] B_SCALE = 1,
    parameter Q_BITS = 24,  // what is shifted, signed
    parameter SHIFT = 0,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
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
  localparam OUT = 3 + ROUND + (CLAMP_LOW || CLAMP_HIGH ? 1 : 0);
  wire room;
  wire go = a_valid & b_valid & room;
  assign a_ready = b_valid & room;
  assign b_ready = a_valid & room;

  reg [OUT:1] valid;
  reg [PE*A_BITS-1:0] a;
  reg [PE*B_BITS-1:0] b;
  always @(posedge clk) begin
    valid <= {valid, go};
    a <= a_data;
    b <= b_data;
    if (rst) valid <= 0;
  end

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [A_BITS:0] as = {A_SIGNED ? a[p*A_BITS+A_BITS-1] : 1'b0, a[p*A_BITS+:A_BITS]};
      wire signed [B_BITS:0] bs = {B_SIGNED ? b[p*B_BITS+B_BITS-1] : 1'b0, b[p*B_BITS+:B_BITS]};
      reg signed [Q_BITS-1:0] first, second, total;
      always @(posedge clk) begin
        first <= PRODUCT ? as * bs : as * A_SCALE;
        second <= PRODUCT ? 0 : bs * B_SCALE;
        total <= PRODUCT ? first * A_SCALE : first + second;
      end
      requantize #(
          .A_BITS(Q_BITS),
          .MULTIPLY(0),
          .M_BITS(1),
          .P_BITS(Q_BITS),
          .SHIFT(SHIFT),
          .ROUND(ROUND),
          .Y_BITS(Y_BITS),
          .CLAMP_LOW(CLAMP_LOW),
          .CLAMP_HIGH(CLAMP_HIGH),
          .LOW(LOW),
          .HIGH(HIGH)
      ) out (
          .clk(clk),
          .a(total),
          .m(1'b0),
          .y(y[p*Y_BITS+:Y_BITS])
      );
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
      .push(valid[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
