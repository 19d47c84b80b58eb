// The product of two streams, head by head. Frames of b are loaded into two buffers that take turns; a is multiplied as in matvec.v,
// with b in the place of the weights.
//
// TRANSPOSED 1 (scores): the sums run over the channels of b, the columns over its tokens. A word is SIMD channels of a token,
//                        PE banks hold every PE-th token.
// TRANSPOSED 0 (values): the sums run over the tokens of b, the columns over its channels. A word is PE channels of a token, SIMD
//                        banks hold every SIMD-th token.
module matmul #(
    parameter TRANSPOSED = 1,
    parameter HEADS = 1,
    parameter ROWS = 1,     // length of a sum / SIMD
    parameter COLUMNS = 1,  // columns per head / PE
    parameter SIMD = 1,
    parameter PE = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter W_BITS = 8,
    parameter W_SIGNED = 1,
    parameter STYLE = 1,    // see product.v
    parameter EXPONENT = 0,
    parameter P_BITS = 16,
    parameter A_BITS = 24,
    parameter MULTIPLY = 1,
    parameter SCALED = 5,  // cycles of requantize.v
    parameter M_BITS = 16,
    parameter signed [31:0] MULTIPLIER = 1,
    parameter Q_BITS = 32,
    parameter SHIFT = 16,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter TURNS = 1,    // see scale_array.v
    parameter TOKENS = 1,   // of a
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [SIMD*X_BITS-1:0] a_data,
    input b_valid,
    output b_ready,
    input [(TRANSPOSED ? SIMD : PE)*W_BITS-1:0] b_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam BANKS = TRANSPOSED ? PE : SIMD;
  localparam LANES = TRANSPOSED ? SIMD : PE;  // of a word
  localparam INNER = TRANSPOSED ? ROWS : COLUMNS;  // words per head and token
  localparam OUTER = TRANSPOSED ? COLUMNS : ROWS;  // tokens per bank
  localparam LINE = HEADS * INNER;                 // words per token
  localparam WORDS = OUTER * LINE;                 // of a bank and buffer
  localparam A = $clog2(2 * WORDS);
  localparam LB = LINE > 1 ? $clog2(LINE) : 1;
  localparam BB = BANKS > 1 ? $clog2(BANKS) : 1;
  localparam OB = OUTER > 1 ? $clog2(OUTER) : 1;
  localparam RB = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam CB = COLUMNS > 1 ? $clog2(COLUMNS) : 1;
  localparam HB = HEADS > 1 ? $clog2(HEADS) : 1;
  localparam TB = TOKENS > 1 ? $clog2(TOKENS) : 1;

  reg [1:0] full;
  reg w_half, r_half;

  // Loading.
  reg [LB-1:0] w_line;
  reg [BB-1:0] w_bank;
  reg [OB-1:0] w_outer;
  reg [A-1:0] w_start;  // of the token, in its bank
  wire take = b_valid & b_ready;
  wire w_end_line = w_line == LINE - 1;
  wire w_end_bank = w_bank == BANKS - 1;
  wire w_end = take & w_end_line & w_end_bank & w_outer == OUTER - 1;
  wire [A-1:0] w_address = (w_half ? WORDS : 0) + w_start + w_line;
  assign b_ready = full != 2;

  // Multiplying.
  reg [RB-1:0] row;
  reg [CB-1:0] column;
  reg [HB-1:0] head;
  reg [TB-1:0] token;
  reg [A-1:0] r_head, r_offset;  // first word of the head; offset from there
  wire room;
  wire first_pass = column == 0;
  wire last_row = row == ROWS - 1;
  wire last_column = column == COLUMNS - 1;
  wire last_head = head == HEADS - 1;
  wire ready = (room | ~last_row) & full != 0;
  wire go = ready & (a_valid | ~first_pass);
  wire done = go & last_row;
  wire r_end = done & last_column & last_head & token == TOKENS - 1;
  wire [A-1:0] r_address = (r_half ? WORDS : 0) + r_head + r_offset;
  assign a_ready = ready & first_pass;

  always @(posedge clk) begin
    full <= full + {1'b0, w_end} - {1'b0, r_end};
    if (take) begin
      w_line <= w_end_line ? {LB{1'b0}} : w_line + 1'b1;
      if (w_end_line) w_bank <= w_end_bank ? {BB{1'b0}} : w_bank + 1'b1;
      if (w_end_line & w_end_bank) begin
        w_outer <= w_outer == OUTER - 1 ? {OB{1'b0}} : w_outer + 1'b1;
        w_start <= w_outer == OUTER - 1 ? {A{1'b0}} : w_start + LINE;
      end
      if (w_end) w_half <= ~w_half;
    end
    if (go) begin
      row <= last_row ? {RB{1'b0}} : row + 1'b1;
      if (!last_row) r_offset <= r_offset + (TRANSPOSED ? 1 : LINE);
      else if (!last_column) r_offset <= r_offset + (TRANSPOSED ? LINE - (ROWS - 1) : 1 - (ROWS - 1) * LINE);
      else r_offset <= 0;
      if (last_row) column <= last_column ? {CB{1'b0}} : column + 1'b1;
      if (last_row & last_column) begin
        head <= last_head ? {HB{1'b0}} : head + 1'b1;
        r_head <= last_head ? {A{1'b0}} : r_head + INNER;
        if (last_head) token <= token == TOKENS - 1 ? {TB{1'b0}} : token + 1'b1;
      end
      if (r_end) r_half <= ~r_half;
    end
    if (rst) begin
      full <= 0;
      w_half <= 0;
      r_half <= 0;
      w_line <= 0;
      w_bank <= 0;
      w_outer <= 0;
      w_start <= 0;
      row <= 0;
      column <= 0;
      head <= 0;
      token <= 0;
      r_head <= 0;
      r_offset <= 0;
    end
  end

  // Fetch.
  reg [SIMD*X_BITS-1:0] x;
  wire [PE*SIMD*W_BITS-1:0] w;
  genvar i, j;
  generate
    if (COLUMNS > 1) begin : replay
      reg [SIMD*X_BITS-1:0] kept[0:ROWS-1];
      always @(posedge clk) begin
        if (go & first_pass) kept[row] <= a_data;
        x <= first_pass ? a_data : kept[row];
      end
    end else begin : stream
      always @(posedge clk) x <= a_data;
    end
    for (i = 0; i < BANKS; i = i + 1) begin : bank
      reg [LANES*W_BITS-1:0] words[0:2*WORDS-1];
      reg [LANES*W_BITS-1:0] word;
      always @(posedge clk) begin
        if (take && w_bank == i) words[w_address] <= b_data;
        word <= words[r_address];
      end
      for (j = 0; j < LANES; j = j + 1) begin : lane
        // w has SIMD weights for PE 0, then for PE 1 ...
        if (TRANSPOSED) begin : scores
          assign w[(i*SIMD+j)*W_BITS+:W_BITS] = word[j*W_BITS+:W_BITS];
        end else begin : values
          assign w[(j*SIMD+i)*W_BITS+:W_BITS] = word[j*W_BITS+:W_BITS];
        end
      end
    end
  endgenerate

  wire push, advance, turn;
  wire [PE*Y_BITS-1:0] y;
  mac_array #(
      .SIMD(SIMD),
      .PE(PE),
      .X_BITS(X_BITS),
      .X_SIGNED(X_SIGNED),
      .W_BITS(W_BITS),
      .W_SIGNED(W_SIGNED),
      .STYLE(STYLE),
      .EXPONENT(EXPONENT),
      .P_BITS(P_BITS),
      .A_BITS(A_BITS),
      .MULTIPLY(MULTIPLY),
      .SCALED(SCALED),
      .M_BITS(M_BITS),
      .Q_BITS(Q_BITS),
      .SHIFT(SHIFT),
      .ROUND(ROUND),
      .Y_BITS(Y_BITS),
      .CLAMP_LOW(CLAMP_LOW),
      .CLAMP_HIGH(CLAMP_HIGH),
      .LOW(LOW),
      .HIGH(HIGH),
      .TURNS(TURNS)
  ) macs (
      .clk(clk),
      .rst(rst),
      .go(go),
      .done(done),
      .x(x),
      .w(w),
      .bias({PE * A_BITS{1'b0}}),
      .multiplier({PE / TURNS{MULTIPLIER[M_BITS-1:0]}}),
      .advance(advance),
      .turn(turn),
      .push(push),
      .y(y)
  );

  credit_fifo #(
      .WIDTH(PE * Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(done),
      .push(push),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
