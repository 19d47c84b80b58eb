// p = a * b, 3 cycles later: registers for the operands, the product and the result, as DSP blocks have them. Operands of more than
// 18 bits take 4 cycles, since blocks of some families need an adder behind them.
//
// Synthesis for 7 series finds these registers; Yosys does not for ECP5, where rtl/ecp5/multiply.v takes the place of this file.
module multiply #(
    parameter A_BITS = 18,  // signed
    parameter B_BITS = 18,  // signed
    parameter P_BITS = 36
) (
    input clk,
    input signed [A_BITS-1:0] a,
    input signed [B_BITS-1:0] b,
    output signed [P_BITS-1:0] p
);
  reg signed [A_BITS-1:0] a_r;
  reg signed [B_BITS-1:0] b_r;
  reg signed [P_BITS-1:0] product, result;
  always @(posedge clk) begin
    a_r <= a;
    b_r <= b;
    product <= a_r * b_r;
    result <= product;
  end
  generate
    if (A_BITS > 18 || B_BITS > 18) begin : wide
      reg signed [P_BITS-1:0] late;
      always @(posedge clk) late <= result;
      assign p = late;
    end else begin : narrow
      assign p = result;
    end
  endgenerate
endmodule
