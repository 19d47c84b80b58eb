// y = x * SCALE: by a multiplier in the cycles of multiply.v, or, where SCALE is a power of two (MULTIPLY 0), in a register.
module scale_by #(
    parameter MULTIPLY = 1,
    parameter X_BITS = 9,   // signed
    parameter M_BITS = 18,  // of SCALE, signed
    parameter signed [31:0] SCALE = 1,
    parameter Y_BITS = 24
) (
    input clk,
    input signed [X_BITS-1:0] x,
    output signed [Y_BITS-1:0] y
);
  generate
    if (MULTIPLY) begin : multiplier
      multiply #(
          .A_BITS(X_BITS),
          .B_BITS(M_BITS),
          .P_BITS(Y_BITS)
      ) unit (
          .clk(clk),
          .a(x),
          .b(SCALE[M_BITS-1:0]),
          .p(y)
      );
    end else begin : shift
      reg signed [Y_BITS-1:0] r;
      always @(posedge clk) r <= x * SCALE;
      assign y = r;
    end
  endgenerate
endmodule
