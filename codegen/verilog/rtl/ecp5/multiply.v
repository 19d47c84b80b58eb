// The same as rtl/multiply.v in blocks of ECP5, with their own registers: Lattice, "ECP5 and ECP5-5G sysDSP Usage Guide" (FPGA-TN-02205).
// Wide operands are cut into 17 bits without sign and a rest with it; a fourth cycle adds the products of all parts.
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
  localparam A_PARTS = A_BITS > 18 ? (A_BITS + 15) / 17 : 1;
  localparam B_PARTS = B_BITS > 18 ? (B_BITS + 15) / 17 : 1;
  localparam PARTS = A_PARTS * B_PARTS;
  wire signed [17*A_PARTS:0] a_wide = a;
  wire signed [17*B_PARTS:0] b_wide = b;

  genvar i, j;
  generate
    for (i = 0; i < A_PARTS; i = i + 1) begin : by_a
      for (j = 0; j < B_PARTS; j = j + 1) begin : by_b
        wire [17:0] a_part = {i == A_PARTS - 1 ? a_wide[17*A_PARTS] : 1'b0, a_wide[17*i+:17]};
        wire [17:0] b_part = {j == B_PARTS - 1 ? b_wide[17*B_PARTS] : 1'b0, b_wide[17*j+:17]};
        wire signed [35:0] product;
        multiply_18x18 block (
            .clk(clk),
            .a(a_part),
            .b(b_part),
            .p(product)
        );
        wire signed [P_BITS-1:0] placed = $signed({{P_BITS{product[35]}}, product}) <<< (17 * (i + j));
        wire signed [P_BITS-1:0] sum;  // of the parts so far
        if (i == 0 && j == 0) begin : first
          assign sum = placed;
        end else if (j == 0) begin : row
          assign sum = by_a[i-1].by_b[B_PARTS-1].sum + placed;
        end else begin : column
          assign sum = by_a[i].by_b[j-1].sum + placed;
        end
      end
    end
    if (PARTS > 1) begin : wide
      reg signed [P_BITS-1:0] late;
      always @(posedge clk) late <= by_a[A_PARTS-1].by_b[B_PARTS-1].sum;
      assign p = late;
    end else begin : narrow
      assign p = by_a[0].by_b[0].sum;
    end
  endgenerate
endmodule

// One block with all its registers.
module multiply_18x18 (
    input clk,
    input signed [17:0] a,
    input signed [17:0] b,
    output signed [35:0] p
);
  MULT18X18D #(
      .REG_INPUTA_CLK("CLK0"),
      .REG_INPUTB_CLK("CLK0"),
      .REG_PIPELINE_CLK("CLK0"),
      .REG_OUTPUT_CLK("CLK0")
  ) dsp (
      .A0(a[0]), .A1(a[1]), .A2(a[2]), .A3(a[3]), .A4(a[4]), .A5(a[5]),
      .A6(a[6]), .A7(a[7]), .A8(a[8]), .A9(a[9]), .A10(a[10]), .A11(a[11]),
      .A12(a[12]), .A13(a[13]), .A14(a[14]), .A15(a[15]), .A16(a[16]), .A17(a[17]),
      .B0(b[0]), .B1(b[1]), .B2(b[2]), .B3(b[3]), .B4(b[4]), .B5(b[5]),
      .B6(b[6]), .B7(b[7]), .B8(b[8]), .B9(b[9]), .B10(b[10]), .B11(b[11]),
      .B12(b[12]), .B13(b[13]), .B14(b[14]), .B15(b[15]), .B16(b[16]), .B17(b[17]),
      .C0(1'b0), .C1(1'b0), .C2(1'b0), .C3(1'b0), .C4(1'b0), .C5(1'b0),
      .C6(1'b0), .C7(1'b0), .C8(1'b0), .C9(1'b0), .C10(1'b0), .C11(1'b0),
      .C12(1'b0), .C13(1'b0), .C14(1'b0), .C15(1'b0), .C16(1'b0), .C17(1'b0),
      .SIGNEDA(1'b1), .SIGNEDB(1'b1), .SOURCEA(1'b0), .SOURCEB(1'b0),
      .CLK0(clk), .CE0(1'b1), .RST0(1'b0),
      .P0(p[0]), .P1(p[1]), .P2(p[2]), .P3(p[3]), .P4(p[4]), .P5(p[5]),
      .P6(p[6]), .P7(p[7]), .P8(p[8]), .P9(p[9]), .P10(p[10]), .P11(p[11]),
      .P12(p[12]), .P13(p[13]), .P14(p[14]), .P15(p[15]), .P16(p[16]), .P17(p[17]),
      .P18(p[18]), .P19(p[19]), .P20(p[20]), .P21(p[21]), .P22(p[22]), .P23(p[23]),
      .P24(p[24]), .P25(p[25]), .P26(p[26]), .P27(p[27]), .P28(p[28]), .P29(p[29]),
      .P30(p[30]), .P31(p[31]), .P32(p[32]), .P33(p[33]), .P34(p[34]), .P35(p[35])
  );
endmodule
