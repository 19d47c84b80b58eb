// The exact sum of products of minifloats: a sign, E exponent bits, M mantissa bits; e > 0: 2^(e - 1) (2^M + m), e = 0: m.
//
// The product of the significands is shifted by the sum of the exponents and added to an integer, so no sum is ever rounded; its step
// is the product of both formats' smallest numbers. `first` begins a sum. 3 cycles.
module minifloat_mac #(
    parameter X_EXPONENT = 2,
    parameter X_MANTISSA = 1,
    parameter W_EXPONENT = 2,
    parameter W_MANTISSA = 1,
    parameter A_BITS = 16
) (
    input clk,
    input valid,
    input first,
    input [X_EXPONENT+X_MANTISSA:0] x,
    input [W_EXPONENT+W_MANTISSA:0] w,
    output signed [A_BITS-1:0] a
);
  localparam P = X_MANTISSA + W_MANTISSA + 2;
  localparam WIDEST = (1 << X_EXPONENT) - 2 + (1 << W_EXPONENT) - 2;  // largest shift
  localparam S = WIDEST > 0 ? $clog2(WIDEST + 1) : 1;

  wire [X_EXPONENT-1:0] xe = x[X_MANTISSA+:X_EXPONENT];
  wire [W_EXPONENT-1:0] we = w[W_MANTISSA+:W_EXPONENT];
  // The leading bit is 0 where the exponent is, and exponents 0 and 1 weigh the same.
  wire [X_MANTISSA:0] xs;
  wire [W_MANTISSA:0] ws;
  generate
    if (X_MANTISSA > 0) begin : x_fraction
      assign xs = {|xe, x[X_MANTISSA-1:0]};
    end else begin : x_one
      assign xs = |xe;
    end
    if (W_MANTISSA > 0) begin : w_fraction
      assign ws = {|we, w[W_MANTISSA-1:0]};
    end else begin : w_one
      assign ws = |we;
    end
  endgenerate

  reg [P-1:0] product;
  reg [S-1:0] places;
  reg [P+WIDEST-1:0] shifted;
  reg sign, sign_late;
  reg [2:1] begins, holds;
  reg signed [A_BITS-1:0] sum;
  wire signed [A_BITS-1:0] term = shifted;
  wire signed [A_BITS-1:0] from = begins[2] ? {A_BITS{1'b0}} : sum;
  always @(posedge clk) begin
    product <= xs * ws;
    places <= (xe - |xe) + (we - |we);
    sign <= x[X_EXPONENT+X_MANTISSA] ^ w[W_EXPONENT+W_MANTISSA];
    shifted <= product << places;
    sign_late <= sign;
    begins <= {begins, first};
    holds <= {holds, ~valid};
    if (!holds[2]) sum <= sign_late ? from - term : from + term;
  end
  assign a = sum;
endmodule
