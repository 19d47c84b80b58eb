// FIRST constant beats, then REST beats from the input, and again. The first waits until the input offers a beat.
module prepend #(
    parameter PE = 1,
    parameter FIRST = 1,
    parameter REST = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter Y_BITS = 8,
    parameter DEPTH = 2,
    parameter ROWS = "rows.hex"
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
  localparam B = $clog2(FIRST + REST);
  localparam FB = FIRST > 1 ? $clog2(FIRST) : 1;
  reg [PE*Y_BITS-1:0] rows[0:(1<<FB)-1];  // those from FIRST on are read and not used
  reg [B-1:0] index;
  wire room;
  wire constant = index < FIRST;
  wire go = room & (s_valid | (constant & index != 0));
  assign s_ready = room & ~constant;
  initial $readmemh(ROWS, rows);
  always @(posedge clk) begin
    if (go) index <= index == FIRST + REST - 1 ? {B{1'b0}} : index + 1'b1;
    if (rst) index <= 0;
  end

  wire [PE*Y_BITS-1:0] x;
  wire [B+FB-1:0] padded_index = index;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [X_BITS:0] a = {X_SIGNED ? s_data[p*X_BITS+X_BITS-1] : 1'b0, s_data[p*X_BITS+:X_BITS]};
      wire signed [Y_BITS:0] wide = a;
      assign x[p*Y_BITS+:Y_BITS] = wide[Y_BITS-1:0];
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
      .push(go),
      .push_data(constant ? rows[padded_index[FB-1:0]] : x),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
