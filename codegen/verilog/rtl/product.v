// x * w.
//
// STYLE 0: a multiplication, which synthesis gives to a DSP block; 1 cycle.
// STYLE 1: radix-4 digits of w. A digit 0..3 selects 0, x, 2x or 3x, where 3x (`triple`) is shared by all that multiply the
//          same x; the last digit of a signed w selects 0, x, -2x or -x. One digit is added per cycle: (W_BITS + 1) / 2
//          cycles. Each bit is one selecting LUT per digit, the adders' own LUTs included.
// STYLE 2: x is the code of a power of two: w * 2^(EXPONENT - x); 1 cycle.
module product #(
    parameter X_BITS = 8,
    parameter W_BITS = 4,
    parameter W_SIGNED = 1,
    parameter P_BITS = 12,
    parameter STYLE = 1,
    parameter EXPONENT = 0
) (
    input clk,
    input signed [X_BITS-1:0] x,
    input signed [X_BITS+1:0] triple,
    input [W_BITS-1:0] w,
    output signed [P_BITS-1:0] p
);
  localparam DIGITS = (W_BITS + 1) / 2;
  localparam T_BITS = X_BITS + 2;

  genvar i;
  generate
    if (STYLE == 0) begin : dsp
      wire signed [W_BITS:0] w_signed = {W_SIGNED ? w[W_BITS-1] : 1'b0, w};
      reg signed [P_BITS-1:0] r;
      always @(posedge clk) r <= x * w_signed;
      assign p = r;
    end else if (STYLE == 2) begin : power
      wire signed [W_BITS:0] w_signed = {W_SIGNED ? w[W_BITS-1] : 1'b0, w};
      wire [X_BITS-1:0] places = EXPONENT[X_BITS-1:0] - x;
      reg signed [P_BITS-1:0] r;
      always @(posedge clk) r <= w_signed <<< places;
      assign p = r;
    end else begin : digits
      // Digit i is added to the upper part of the sum of the digits below it.
      for (i = 0; i < DIGITS; i = i + 1) begin : stage
        localparam SIGNED_DIGIT = W_SIGNED && i == DIGITS - 1;
        localparam SUM = X_BITS + 2 * i + 2;  // a bit more than the sum needs
        wire signed [X_BITS-1:0] xi;
        wire signed [T_BITS-1:0] ti;
        wire [2*DIGITS-1:0] wi;  // digits from i on
        if (i == 0) begin : first
          assign xi = x;
          assign ti = triple;
          assign wi = W_BITS == 2 * DIGITS ? w : {W_SIGNED ? w[W_BITS-1] : 1'b0, w};
        end else begin : later
          reg signed [X_BITS-1:0] x_r;
          reg signed [T_BITS-1:0] t_r;
          reg [2*DIGITS-1:0] w_r;
          always @(posedge clk) begin
            x_r <= stage[i-1].xi;
            t_r <= stage[i-1].ti;
            w_r <= stage[i-1].wi >> 2;
          end
          assign xi = x_r;
          assign ti = t_r;
          assign wi = w_r;
        end
        wire [1:0] digit = wi[1:0];
        wire [T_BITS-1:0] wide = {{2{xi[X_BITS-1]}}, xi};
        wire [T_BITS-1:0] twice = {xi[X_BITS-1], xi, 1'b0};
        wire [T_BITS-1:0] three = SIGNED_DIGIT ? ~wide : ti;
        wire [T_BITS-1:0] two = SIGNED_DIGIT ? ~twice : twice;
        wire [T_BITS-1:0] term = digit[1] ? (digit[0] ? three : two) : (digit[0] ? wide : {T_BITS{1'b0}});
        wire carry = SIGNED_DIGIT ? digit[1] : 1'b0;
        reg signed [SUM-1:0] s;
        if (i == 0) begin : lowest
          if (SIGNED_DIGIT) begin : only
            always @(posedge clk) s <= term + carry;
          end else begin : plain
            always @(posedge clk) s <= term;
          end
        end else begin : upper
          // The carry enters through an extra lowest bit, so that one adder is enough.
          wire signed [T_BITS-1:0] below = $signed(stage[i-1].s[SUM-3:2*i]);
          wire [T_BITS:0] total = {below, 1'b1} + {term, carry};
          always @(posedge clk) s <= {total[T_BITS:1], stage[i-1].s[2*i-1:0]};
        end
      end
      assign p = stage[DIGITS-1].s[P_BITS-1:0];
    end
  endgenerate
endmodule
