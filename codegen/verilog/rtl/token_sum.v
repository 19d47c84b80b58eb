// y = requantize(sum of x over TOKENS tokens), channel by channel. The sums of all groups of channels go round in a ring.
module token_sum #(
    parameter PE = 1,
    parameter TOKENS = 1,
    parameter GROUPS = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter A_BITS = 16,  // signed
    parameter MULTIPLY = 1,
    parameter SCALED = 5,  // cycles of requantize.v
    parameter M_BITS = 16,
    parameter signed [31:0] MULTIPLIER = 1,
    parameter Q_BITS = 32,
    parameter SHIFT = 16,
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
    input s_valid,
    output s_ready,
    input [PE*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam OUT = 1 + SCALED;
  localparam TB = TOKENS > 1 ? $clog2(TOKENS) : 1;
  localparam GB = GROUPS > 1 ? $clog2(GROUPS) : 1;
  reg [TB-1:0] token;
  reg [GB-1:0] group;
  reg [OUT:1] valid;
  wire room;
  wire last = token == TOKENS - 1;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~last;
  always @(posedge clk) begin
    valid <= {valid, go & last};
    if (go) begin
      group <= group == GROUPS - 1 ? {GB{1'b0}} : group + 1'b1;
      if (group == GROUPS - 1) token <= last ? {TB{1'b0}} : token + 1'b1;
    end
    if (rst) begin
      group <= 0;
      token <= 0;
      valid <= 0;
    end
  end

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [X_BITS:0] x = {X_SIGNED ? s_data[p*X_BITS+X_BITS-1] : 1'b0, s_data[p*X_BITS+:X_BITS]};
      reg [GROUPS*A_BITS-1:0] ring;
      wire signed [A_BITS-1:0] oldest = ring[(GROUPS-1)*A_BITS+:A_BITS];
      wire signed [A_BITS-1:0] newest = ring[0+:A_BITS];
      wire signed [A_BITS-1:0] sum = (token == 0 ? $signed({A_BITS{1'b0}}) : oldest) + x;
      always @(posedge clk) if (go) ring <= {ring, sum};
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
      ) out (
          .clk(clk),
          .a(newest),
          .m(MULTIPLIER[M_BITS-1:0]),
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
      .reserve(go & last),
      .push(valid[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
