// Products, their sums, accumulators and requantization of PE outputs, each from SIMD products per step. The pipeline never stops.
//
// `x` and `w` belong to the step that began a cycle ago, `go` and `done` to the one that begins now; a step that is `done` ends a
// sum. `advance` asks for the `bias` of the next sum, `turn` for the next multipliers (scale_array.v). Outputs are offered by `push`.
module mac_array #(
    parameter SIMD = 1,
    parameter PE = 1,
    parameter EACH = 0,  // every PE has its own x, else all share one
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter W_BITS = 4,
    parameter W_SIGNED = 1,
    parameter STYLE = 1,    // see product.v
    parameter EXPONENT = 0,
    parameter P_BITS = 12,  // products
    parameter A_BITS = 16,  // accumulator, signed
    parameter MULTIPLY = 1,
    parameter SCALED = 5,  // cycles of requantize.v
    parameter M_BITS = 16,
    parameter Q_BITS = 32,  // accumulator times multiplier
    parameter SHIFT = 16,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter TURNS = 1,  // see scale_array.v; at most the steps of a sum
    parameter THRESHOLDS = 0,
    parameter COLUMNS = 1,
    parameter T_BITS = 1,
    parameter [COLUMNS*PE*((1<<THRESHOLDS)-(THRESHOLDS?1:0))*T_BITS-1:0] TABLE = 0
) (
    input clk,
    input rst,
    input go,
    input done,
    input [(EACH ? PE : 1)*SIMD*X_BITS-1:0] x,
    input [PE*SIMD*W_BITS-1:0] w,
    input [PE*A_BITS-1:0] bias,
    input [PE/TURNS*M_BITS-1:0] multiplier,
    output advance,
    output turn,
    output push,
    output [PE*Y_BITS-1:0] y
);
  localparam XS = X_BITS + (X_SIGNED ? 0 : 1);
  localparam LANES = (EACH ? PE : 1) * SIMD;
  localparam TRIPLE = STYLE == 1 && W_BITS > (W_SIGNED ? 2 : 1) ? 1 : 0;
  localparam PRODUCT = STYLE == 1 ? (W_BITS + 1) / 2 : 1;
  // Cycles from a step to the registers: 1 fetch, then perhaps 3x, the product, the tree, the accumulator.
  localparam SUMMED = 1 + TRIPLE + PRODUCT + $clog2(SIMD);
  localparam STORED = SUMMED + 1;
  localparam CAPTURE = TURNS > 1 && THRESHOLDS ? 1 : 0;
  localparam OUT = STORED + CAPTURE + TURNS - 1 + (THRESHOLDS ? THRESHOLDS : SCALED);

  reg [OUT:1] valid, last;  // [i]: the step that began i cycles ago
  reg first;
  assign advance = last[SUMMED-1];
  assign push = last[OUT];
  always @(posedge clk) begin
    valid <= {valid, go};
    last <= {last, done};
    if (valid[SUMMED]) first <= last[SUMMED];
    if (rst) begin
      valid <= 0;
      last <= 0;
      first <= 1'b1;
    end
  end

  // Inputs of the products, and 3x, shared by all that multiply x.
  wire [LANES*XS-1:0] px;
  wire [LANES*(XS+2)-1:0] pt;
  wire [PE*SIMD*W_BITS-1:0] pw;
  wire [PE*A_BITS-1:0] sums;
  genvar s, p;
  generate
    for (s = 0; s < LANES; s = s + 1) begin : lane
      wire [X_BITS:0] extended = {X_SIGNED ? x[s*X_BITS+X_BITS-1] : 1'b0, x[s*X_BITS+:X_BITS]};
      wire signed [XS-1:0] xs = extended[XS-1:0];
      if (TRIPLE) begin : triple
        reg signed [XS-1:0] x_r;
        reg signed [XS+1:0] t_r;
        always @(posedge clk) begin
          x_r <= xs;
          t_r <= xs + (xs <<< 1);
        end
        assign px[s*XS+:XS] = x_r;
        assign pt[s*(XS+2)+:XS+2] = t_r;
      end else begin : single
        assign px[s*XS+:XS] = xs;
        assign pt[s*(XS+2)+:XS+2] = 0;
      end
    end
    if (TRIPLE) begin : delay_w
      reg [PE*SIMD*W_BITS-1:0] w_r;
      always @(posedge clk) w_r <= w;
      assign pw = w_r;
    end else begin : direct_w
      assign pw = w;
    end

    for (p = 0; p < PE; p = p + 1) begin : pe
      wire [SIMD*P_BITS-1:0] products;
      wire signed [A_BITS-1:0] sum;
      for (s = 0; s < SIMD; s = s + 1) begin : element
        localparam L = EACH ? p * SIMD + s : s;
        product #(
            .X_BITS(XS),
            .W_BITS(W_BITS),
            .W_SIGNED(W_SIGNED),
            .P_BITS(P_BITS),
            .STYLE(STYLE),
            .EXPONENT(EXPONENT)
        ) multiply (
            .clk(clk),
            .x(px[L*XS+:XS]),
            .triple(pt[L*(XS+2)+:XS+2]),
            .w(pw[(p*SIMD+s)*W_BITS+:W_BITS]),
            .p(products[s*P_BITS+:P_BITS])
        );
      end
      adder_tree #(
          .N(SIMD),
          .WIDTH(P_BITS),
          .LIMIT(A_BITS)
      ) tree (
          .clk(clk),
          .x(products),
          .sum(sum)
      );
      reg signed [A_BITS-1:0] accumulator;
      wire signed [A_BITS-1:0] start = bias[p*A_BITS+:A_BITS];
      always @(posedge clk) if (valid[SUMMED]) accumulator <= sum + (first ? start : accumulator);
      assign sums[p*A_BITS+:A_BITS] = accumulator;
    end
  endgenerate

  scale_array #(
      .PE(PE),
      .TURNS(TURNS),
      .A_BITS(A_BITS),
      .MULTIPLY(MULTIPLY),
      .M_BITS(M_BITS),
      .Q_BITS(Q_BITS),
      .SHIFT(SHIFT),
      .ROUND(ROUND),
      .Y_BITS(Y_BITS),
      .CLAMP_LOW(CLAMP_LOW),
      .CLAMP_HIGH(CLAMP_HIGH),
      .LOW(LOW),
      .HIGH(HIGH),
      .THRESHOLDS(THRESHOLDS),
      .COLUMNS(COLUMNS),
      .T_BITS(T_BITS),
      .TABLE(TABLE)
  ) scale (
      .clk(clk),
      .rst(rst),
      .soon(last[SUMMED]),
      .a(sums),
      .turn(turn),
      .multiplier(multiplier),
      .y(y)
  );
endmodule
