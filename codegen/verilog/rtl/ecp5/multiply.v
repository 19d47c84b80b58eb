// The same as rtl/multiply.v in a block of ECP5, with its own registers: Lattice, "ECP5 and ECP5-5G sysDSP Usage Guide" (FPGA-TN-02205).
// Operands of more than 18 bits take several blocks, whose registers are not used.
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
  generate
    if (A_BITS <= 18 && B_BITS <= 18) begin : block
      wire signed [17:0] aw = a;
      wire signed [17:0] bw = b;
      wire signed [35:0] pw;
      MULT18X18D #(
          .REG_INPUTA_CLK("CLK0"),
          .REG_INPUTB_CLK("CLK0"),
          .REG_PIPELINE_CLK("CLK0"),
          .REG_OUTPUT_CLK("CLK0")
      ) dsp (
          .A0(aw[0]), .A1(aw[1]), .A2(aw[2]), .A3(aw[3]), .A4(aw[4]), .A5(aw[5]),
          .A6(aw[6]), .A7(aw[7]), .A8(aw[8]), .A9(aw[9]), .A10(aw[10]), .A11(aw[11]),
          .A12(aw[12]), .A13(aw[13]), .A14(aw[14]), .A15(aw[15]), .A16(aw[16]), .A17(aw[17]),
          .B0(bw[0]), .B1(bw[1]), .B2(bw[2]), .B3(bw[3]), .B4(bw[4]), .B5(bw[5]),
          .B6(bw[6]), .B7(bw[7]), .B8(bw[8]), .B9(bw[9]), .B10(bw[10]), .B11(bw[11]),
          .B12(bw[12]), .B13(bw[13]), .B14(bw[14]), .B15(bw[15]), .B16(bw[16]), .B17(bw[17]),
          .C0(1'b0), .C1(1'b0), .C2(1'b0), .C3(1'b0), .C4(1'b0), .C5(1'b0),
          .C6(1'b0), .C7(1'b0), .C8(1'b0), .C9(1'b0), .C10(1'b0), .C11(1'b0),
          .C12(1'b0), .C13(1'b0), .C14(1'b0), .C15(1'b0), .C16(1'b0), .C17(1'b0),
          .SIGNEDA(1'b1), .SIGNEDB(1'b1), .SOURCEA(1'b0), .SOURCEB(1'b0),
          .CLK0(clk), .CE0(1'b1), .RST0(1'b0),
          .P0(pw[0]), .P1(pw[1]), .P2(pw[2]), .P3(pw[3]), .P4(pw[4]), .P5(pw[5]),
          .P6(pw[6]), .P7(pw[7]), .P8(pw[8]), .P9(pw[9]), .P10(pw[10]), .P11(pw[11]),
          .P12(pw[12]), .P13(pw[13]), .P14(pw[14]), .P15(pw[15]), .P16(pw[16]), .P17(pw[17]),
          .P18(pw[18]), .P19(pw[19]), .P20(pw[20]), .P21(pw[21]), .P22(pw[22]), .P23(pw[23]),
          .P24(pw[24]), .P25(pw[25]), .P26(pw[26]), .P27(pw[27]), .P28(pw[28]), .P29(pw[29]),
          .P30(pw[30]), .P31(pw[31]), .P32(pw[32]), .P33(pw[33]), .P34(pw[34]), .P35(pw[35])
      );
      assign p = pw;
    end else begin : wide
      reg signed [A_BITS-1:0] a_r;
      reg signed [B_BITS-1:0] b_r;
      reg signed [P_BITS-1:0] product, result;
      always @(posedge clk) begin
        a_r <= a;
        b_r <= b;
        product <= a_r * b_r;
        result <= product;
      end
      assign p = result;
    end
  endgenerate
endmodule
