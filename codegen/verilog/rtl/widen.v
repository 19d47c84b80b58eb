// RATIO beats become one, the first in its lowest part.
module widen #(
    parameter WIDTH = 8,  // of a part
    parameter RATIO = 2,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [WIDTH-1:0] s_data,
    output m_valid,
    input m_ready,
    output [RATIO*WIDTH-1:0] m_data
);
  localparam B = $clog2(RATIO);
  localparam [B-1:0] LAST = RATIO - 1;
  reg [B-1:0] index;
  reg [(RATIO-1)*WIDTH-1:0] held;
  wire [RATIO*WIDTH-1:0] whole = {s_data, held};
  wire room;
  wire last = index == LAST;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~last;

  always @(posedge clk) begin
    if (go) begin
      index <= last ? {B{1'b0}} : index + 1'b1;
      held <= whole[RATIO*WIDTH-1:WIDTH];
    end
    if (rst) index <= 0;
  end

  credit_fifo #(
      .WIDTH(RATIO * WIDTH),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & last),
      .push(go & last),
      .push_data(whole),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
