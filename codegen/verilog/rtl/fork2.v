// Two copies of a channel. A beat moves on when both have room for it.
module fork2 #(
    parameter WIDTH = 8,
    parameter M0_DEPTH = 2,
    parameter M1_DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [WIDTH-1:0] s_data,
    output m0_valid,
    input m0_ready,
    output [WIDTH-1:0] m0_data,
    output m1_valid,
    input m1_ready,
    output [WIDTH-1:0] m1_data
);
  wire room0, room1;
  wire go = s_valid & s_ready;
  assign s_ready = room0 & room1;

  credit_fifo #(
      .WIDTH(WIDTH),
      .DEPTH(M0_DEPTH)
  ) fifo0 (
      .clk(clk),
      .rst(rst),
      .room(room0),
      .reserve(go),
      .push(go),
      .push_data(s_data),
      .m_valid(m0_valid),
      .m_ready(m0_ready),
      .m_data(m0_data)
  );
  credit_fifo #(
      .WIDTH(WIDTH),
      .DEPTH(M1_DEPTH)
  ) fifo1 (
      .clk(clk),
      .rst(rst),
      .room(room1),
      .reserve(go),
      .push(go),
      .push_data(s_data),
      .m_valid(m1_valid),
      .m_ready(m1_ready),
      .m_data(m1_data)
  );
endmodule
