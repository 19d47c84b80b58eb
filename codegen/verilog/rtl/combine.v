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
    parameter SCALING = 1,   // 0: scales are powers of two, and the first products of sums take 1 cycle
    parameter M_BITS = 18,   // of scales, signed
    parameter FIRST = 5,     // cycles to what is shifted
    parameter Q_BITS = 24,  // what is shifted, signed
    parameter SCALED = 2,   // cycles of requantize.v
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
  localparam OUT = FIRST + SCALED;
  localparam X_BITS = (A_BITS > B_BITS ? A_BITS : B_BITS) + 1;
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
      wire signed [Q_BITS-1:0] total;
      if (PRODUCT) begin : product
        localparam P_BITS = A_BITS + B_BITS + 2;
        wire signed [P_BITS-1:0] both;
        multiply #(
            .A_BITS(A_BITS + 1),
            .B_BITS(B_BITS + 1),
            .P_BITS(P_BITS)
        ) multiply_both (
            .clk(clk),
            .a(as),
            .b(bs),
            .p(both)
        );
        scale_by #(
            .MULTIPLY(SCALING),
            .X_BITS(P_BITS),
            .M_BITS(M_BITS),
            .SCALE(A_SCALE),
            .Y_BITS(Q_BITS)
        ) scale (
            .clk(clk),
            .x(both),
            .y(total)
        );
      end else begin : sum
        wire signed [Q_BITS-1:0] first, second;
        reg signed [Q_BITS-1:0] r;
        scale_by #(
            .MULTIPLY(SCALING),
            .X_BITS(X_BITS),
            .M_BITS(M_BITS),
            .SCALE(A_SCALE),
            .Y_BITS(Q_BITS)
        ) scale_a (
            .clk(clk),
            .x(as),
            .y(first)
        );
        scale_by #(
            .MULTIPLY(SCALING),
            .X_BITS(X_BITS),
            .M_BITS(M_BITS),
            .SCALE(B_SCALE),
            .Y_BITS(Q_BITS)
        ) scale_b (
            .clk(clk),
            .x(bs),
            .y(second)
        );
        always @(posedge clk) r <= first + second;
        assign total = r;
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
