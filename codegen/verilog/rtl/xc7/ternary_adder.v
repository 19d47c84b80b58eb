// y = +-a +- b +- c in one six-input table per bit. The k-th bit of NEGATIVE says that operand k is subtracted; not all three are.
//
// Output O5 of a table is the majority of its three bits, the carry that the bit above adds; O6 is the sum of the three and of the
// carry from the bit below, and drives the carry chain. -x = ~x + 1: the first 1 is the carry below bit 0, the second enters the chain.
module ternary_adder #(
    parameter WIDTH = 8,
    parameter [2:0] NEGATIVE = 0
) (
    input [WIDTH-1:0] a,
    input [WIDTH-1:0] b,
    input [WIDTH-1:0] c,
    output [WIDTH-1:0] y
);
  localparam BLOCKS = (WIDTH + 3) / 4;
  localparam [1:0] ONES = 2'd0 + NEGATIVE[0] + NEGATIVE[1] + NEGATIVE[2];

  // Bit i of a table's contents: its inputs are (carry, c, b, a) = i, each operand inverted where it is subtracted.
  function [15:0] contents(input sum);
    integer i;
    reg p, q, r;
    for (i = 0; i < 16; i = i + 1) begin
      p = i[0] ^ NEGATIVE[0];
      q = i[1] ^ NEGATIVE[1];
      r = i[2] ^ NEGATIVE[2];
      contents[i] = sum ? p ^ q ^ r ^ i[3] : p & q | p & r | q & r;
    end
  endfunction
  localparam [15:0] SUM = contents(1'b1), MAJORITY = contents(1'b0);

  wire [4*BLOCKS-1:0] propagate, below, total;
  wire [4*BLOCKS:0] carry;
  wire [WIDTH:0] majority;
  assign majority[0] = ONES > 0;
  assign carry[0] = ONES > 1;
  genvar i;
  generate
    for (i = 0; i < 4 * BLOCKS; i = i + 1) begin : bits
      if (i < WIDTH) begin : table_
        LUT6_2 #(
            .INIT({SUM, SUM, MAJORITY, MAJORITY})
        ) both (
            .I0(a[i]),
            .I1(b[i]),
            .I2(c[i]),
            .I3(majority[i]),
            .I4(1'b0),
            .I5(1'b1),
            .O5(majority[i+1]),
            .O6(propagate[i])
        );
        assign below[i] = majority[i];
      end else begin : unused
        assign propagate[i] = 1'b0;
        assign below[i] = 1'b0;
      end
    end
    for (i = 0; i < BLOCKS; i = i + 1) begin : chain
      CARRY4 four (
          .CI(i == 0 ? 1'b0 : carry[4*i]),
          .CYINIT(i == 0 ? carry[0] : 1'b0),
          .S(propagate[4*i+:4]),
          .DI(below[4*i+:4]),
          .O(total[4*i+:4]),
          .CO(carry[4*i+1+:4])
      );
    end
  endgenerate
  assign y = total[WIDTH-1:0];
endmodule
