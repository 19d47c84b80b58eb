// z = round_half_even((C x - S1) root / 2^(SHIFT + k)) for a row of BEATS beats (a), given {k, root, S1} (b, one beat per row).
module row_normalize #(
    parameter PE = 1,
    parameter BEATS = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter C = 1,
    parameter S_BITS = 16,
    parameter D_BITS = 16,  // C x - S1, signed
    parameter K_BITS = 4,
    parameter LAST_K = 15,
    parameter R_BITS = 15,
    parameter SHIFT = 4,    // positive
    parameter Y_BITS = 13,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [PE*X_BITS-1:0] a_data,
    input b_valid,
    output b_ready,
    input [K_BITS+R_BITS+S_BITS-1:0] b_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam WIDE = D_BITS > 18 || R_BITS > 17 ? 1 : 0;  // multiply.v takes a cycle more
  localparam OUT = 6 + WIDE;
  localparam P = D_BITS + R_BITS + 1;
  localparam G = SHIFT + LAST_K;  // bits that may be shifted out
  localparam B = BEATS > 1 ? $clog2(BEATS) : 1;
  reg [B-1:0] beat;
  reg [OUT:1] valid;
  reg [K_BITS+R_BITS+S_BITS-1:0] held;
  wire room;
  wire first = beat == 0;
  wire go = a_valid & room & (b_valid | ~first);
  assign a_ready = room & (b_valid | ~first);
  assign b_ready = room & a_valid & first;
  wire [K_BITS+R_BITS+S_BITS-1:0] row = first ? b_data : held;

  reg [PE*X_BITS-1:0] x;
  reg signed [S_BITS-1:0] s1;
  reg [R_BITS-1:0] root1;
  reg [K_BITS-1:0] k1, k2, k3, k4, k5;
  wire [K_BITS-1:0] earlier = WIDE ? k4 : k3;  // of the product, and a cycle earlier
  wire [K_BITS-1:0] places = WIDE ? k5 : k4;
  reg [G-1:0] below;  // ones where bits are lost below the highest lost one
  always @(posedge clk) begin
    valid <= {valid, go};
    x <= a_data;
    s1 <= row[S_BITS-1:0];
    root1 <= row[S_BITS+:R_BITS];
    k1 <= row[S_BITS+R_BITS+:K_BITS];
    k2 <= k1;
    k3 <= k2;
    k4 <= k3;
    k5 <= k4;
    below <= ({{G - 1{1'b0}}, 1'b1} << (earlier + SHIFT - 1)) - 1'b1;
    if (go) begin
      beat <= beat == BEATS - 1 ? {B{1'b0}} : beat + 1'b1;
      if (first) held <= b_data;
    end
    if (rst) begin
      beat <= 0;
      valid <= 0;
    end
  end

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [X_BITS:0] xs = {X_SIGNED ? x[p*X_BITS+X_BITS-1] : 1'b0, x[p*X_BITS+:X_BITS]};
      wire signed [D_BITS-1:0] d = xs * $signed(C) - s1;
      wire signed [P-1:0] product;
      reg signed [Y_BITS:0] kept;
      reg half, sticky;
      reg [Y_BITS-1:0] z;
      wire signed [P-1:0] shifted = product >>> (places + SHIFT - 1);
      multiply #(
          .A_BITS(D_BITS),
          .B_BITS(R_BITS + 1),
          .P_BITS(P)
      ) unit (
          .clk(clk),
          .a(d),
          .b({1'b0, root1}),
          .p(product)
      );
      always @(posedge clk) begin
        kept <= shifted[P-1:1];
        half <= shifted[0];
        sticky <= |(product[G-1:0] & below);
        z <= kept + $signed({1'b0, half & (sticky | kept[0])});
      end
      assign y[p*Y_BITS+:Y_BITS] = z;
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
