// y = +-a +- b +- c. The k-th bit of NEGATIVE says that operand k is subtracted; not all three are.
module ternary_adder #(
    parameter WIDTH = 8,
    parameter [2:0] NEGATIVE = 0
) (
    input [WIDTH-1:0] a,
    input [WIDTH-1:0] b,
    input [WIDTH-1:0] c,
    output [WIDTH-1:0] y
);
  assign y = (NEGATIVE[0] ? -a : a) + (NEGATIVE[1] ? -b : b) + (NEGATIVE[2] ? -c : c);
endmodule
