// y = table[x], for every lane; the table is in the order of the bit patterns of x.
module lookup #(
    parameter PE = 1,
    parameter X_BITS = 8,
    parameter Y_BITS = 8,
    parameter DEPTH = 2,
    parameter TABLE = "table.hex"
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [PE*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  wire room;
  wire go = s_valid & s_ready;
  assign s_ready = room;
  reg push;
  always @(posedge clk) push <= go & ~rst;

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      reg [Y_BITS-1:0] entries[0:(1<<X_BITS)-1];
      reg [Y_BITS-1:0] r;
      initial $readmemh(TABLE, entries);
      always @(posedge clk) r <= entries[s_data[p*X_BITS+:X_BITS]];
      assign y[p*Y_BITS+:Y_BITS] = r;
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
      .push(push),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
