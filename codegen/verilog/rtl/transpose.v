// Frames of TOKENS x CHANNELS elements, transposed. SIMD channels of a token come in per beat, PE tokens of a channel go out. Two
// buffers take turns; each is split into SIMD x PE banks, so that both sides reach all their elements at once.
module transpose #(
    parameter TOKENS = 2,
    parameter CHANNELS = 2,
    parameter SIMD = 1,
    parameter PE = 1,
    parameter BITS = 8,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [SIMD*BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*BITS-1:0] m_data
);
  localparam T = TOKENS / PE;
  localparam C = CHANNELS / SIMD;
  localparam A = $clog2(2 * T * C);
  localparam TB = T > 1 ? $clog2(T) : 1;
  localparam CB = C > 1 ? $clog2(C) : 1;
  localparam PB = PE > 1 ? $clog2(PE) : 1;
  localparam SB = SIMD > 1 ? $clog2(SIMD) : 1;

  reg [1:0] full;
  reg w_half, r_half;
  reg [TB-1:0] w_token, r_token;
  reg [PB-1:0] w_lane;
  reg [CB-1:0] w_channel, r_channel;
  reg [SB-1:0] r_lane, r_lane_late;
  wire room;

  wire take = s_valid & s_ready;
  wire w_end_channel = w_channel == C - 1;
  wire w_end_lane = w_lane == PE - 1;
  wire w_end = take & w_end_channel & w_end_lane & w_token == T - 1;
  assign s_ready = full != 2;

  wire go = room & full != 0;
  wire r_end_token = r_token == T - 1;
  wire r_end_lane = r_lane == SIMD - 1;
  wire r_end = go & r_end_token & r_end_lane & r_channel == C - 1;

  wire [A-1:0] w_address = (w_half ? T * C : 0) + w_token * C + w_channel;
  wire [A-1:0] r_address = (r_half ? T * C : 0) + r_token * C + r_channel;

  reg push;
  always @(posedge clk) begin
    push <= go;
    r_lane_late <= r_lane;
    full <= full + {1'b0, w_end} - {1'b0, r_end};
    if (take) begin
      w_channel <= w_end_channel ? {CB{1'b0}} : w_channel + 1'b1;
      if (w_end_channel) w_lane <= w_end_lane ? {PB{1'b0}} : w_lane + 1'b1;
      if (w_end_channel & w_end_lane) w_token <= w_token == T - 1 ? {TB{1'b0}} : w_token + 1'b1;
      if (w_end) w_half <= ~w_half;
    end
    if (go) begin
      r_token <= r_end_token ? {TB{1'b0}} : r_token + 1'b1;
      if (r_end_token) r_lane <= r_end_lane ? {SB{1'b0}} : r_lane + 1'b1;
      if (r_end_token & r_end_lane) r_channel <= r_channel == C - 1 ? {CB{1'b0}} : r_channel + 1'b1;
      if (r_end) r_half <= ~r_half;
    end
    if (rst) begin
      push <= 0;
      full <= 0;
      w_half <= 0;
      r_half <= 0;
      w_token <= 0;
      r_token <= 0;
      w_lane <= 0;
      r_lane <= 0;
      w_channel <= 0;
      r_channel <= 0;
    end
  end

  wire [SIMD*PE*BITS-1:0] read;
  wire [SIMD*PE*BITS-1:0] chosen = read >> (r_lane_late * PE * BITS);
  genvar s, p;
  generate
    for (s = 0; s < SIMD; s = s + 1) begin : channel
      for (p = 0; p < PE; p = p + 1) begin : token
        reg [BITS-1:0] bank[0:2*T*C-1];
        reg [BITS-1:0] r;
        always @(posedge clk) begin
          if (take && w_lane == p) bank[w_address] <= s_data[s*BITS+:BITS];
          r <= bank[r_address];
        end
        assign read[(s*PE+p)*BITS+:BITS] = r;
      end
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(push),
      .push_data(chosen[PE*BITS-1:0]),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
