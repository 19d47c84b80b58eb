// One beat of RATIO parts becomes RATIO beats, the lowest part first.
module narrow #(
    parameter WIDTH = 8,  // of a part
    parameter RATIO = 2,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [RATIO*WIDTH-1:0] s_data,
    output m_valid,
    input m_ready,
    output [WIDTH-1:0] m_data
);
  localparam B = $clog2(RATIO);
  localparam [B-1:0] LAST = RATIO - 1;
  reg [B-1:0] index;
  reg [(RATIO-1)*WIDTH-1:0] rest;
  wire room;
  wire first = index == 0;
  wire go = room & (s_valid | ~first);
  assign s_ready = room & first;

  always @(posedge clk) begin
    if (go) begin
      index <= index == LAST ? {B{1'b0}} : index + 1'b1;
      rest <= first ? s_data[RATIO*WIDTH-1:WIDTH] : rest >> WIDTH;
    end
    if (rst) index <= 0;
  end

  credit_fifo #(
      .WIDTH(WIDTH),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(go),
      .push_data(first ? s_data[WIDTH-1:0] : rest[WIDTH-1:0]),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
