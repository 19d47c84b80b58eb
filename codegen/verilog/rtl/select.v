// Passes on a range of tokens and, of these, a range of groups of channels.
module select #(
    parameter PE = 1,
    parameter TOKENS = 1,
    parameter FIRST_TOKEN = 0,
    parameter LAST_TOKEN = 0,
    parameter GROUPS = 1,
    parameter FIRST_GROUP = 0,
    parameter LAST_GROUP = 0,
    parameter X_BITS = 8,
    parameter Y_BITS = 8,
    parameter DEPTH = 2
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
  localparam TB = TOKENS > 1 ? $clog2(TOKENS) : 1;
  localparam GB = GROUPS > 1 ? $clog2(GROUPS) : 1;
  reg [TB-1:0] token;
  reg [GB-1:0] group;
  wire room;
  wire wanted = token >= FIRST_TOKEN && token <= LAST_TOKEN && group >= FIRST_GROUP && group <= LAST_GROUP;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~wanted;
  always @(posedge clk) begin
    if (go) begin
      group <= group == GROUPS - 1 ? {GB{1'b0}} : group + 1'b1;
      if (group == GROUPS - 1) token <= token == TOKENS - 1 ? {TB{1'b0}} : token + 1'b1;
    end
    if (rst) begin
      group <= 0;
      token <= 0;
    end
  end

  // The part may have a narrower range than the whole.
  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      assign y[p*Y_BITS+:Y_BITS] = s_data[p*X_BITS+:Y_BITS];
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & wanted),
      .push(go & wanted),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
