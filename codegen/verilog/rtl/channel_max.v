// The largest of every ROWS beats, lane by lane.
module channel_max #(
    parameter PE = 1,
    parameter ROWS = 2,
    parameter BITS = 8,
    parameter SIGNED = 1,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [PE*BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*BITS-1:0] m_data
);
  localparam B = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam [B-1:0] LAST = ROWS - 1;
  reg [B-1:0] row;
  reg push;
  reg [PE*BITS-1:0] largest;
  wire room;
  wire last = row == LAST;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~last;

  always @(posedge clk) begin
    push <= go & last;
    if (go) row <= last ? {B{1'b0}} : row + 1'b1;
    if (rst) begin
      row <= 0;
      push <= 0;
    end
  end

  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [BITS:0] a = {SIGNED ? s_data[p*BITS+BITS-1] : 1'b0, s_data[p*BITS+:BITS]};
      wire signed [BITS:0] b = {SIGNED ? largest[p*BITS+BITS-1] : 1'b0, largest[p*BITS+:BITS]};
      always @(posedge clk) if (go && (row == 0 || a > b)) largest[p*BITS+:BITS] <= s_data[p*BITS+:BITS];
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & last),
      .push(push),
      .push_data(largest),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
