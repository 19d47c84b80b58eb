// The matrix-vector unit: y = requantize(x * W + bias), PE columns and SIMD rows of W at a time.
//
// A token takes ROWS * COLUMNS steps, a step per cycle. The first pass reads SIMD channels of x per step and keeps them, later
// passes replay them. The last step of every pass makes PE outputs. A step waits in front of the pipeline, never inside.
//
// With EACH every PE has its own x, and every step takes a beat: the taps of PE channels of a depthwise convolution, one by one.
module matvec #(
    parameter ROWS = 1,     // K / SIMD, or the taps
    parameter COLUMNS = 1,  // N / PE
    parameter SIMD = 1,
    parameter PE = 1,
    parameter EACH = 0,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter W_BITS = 4,
    parameter W_SIGNED = 1,
    parameter STYLE = 1,    // see product.v
    parameter P_BITS = 12,  // products
    parameter A_BITS = 16,  // accumulator, signed
    parameter MULTIPLY = 1,
    parameter SCALED = 5,  // cycles of requantize.v
    parameter M_BITS = 16,
    parameter Q_BITS = 32,  // accumulator times multiplier
    parameter SHIFT = 16,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter TURNS = 1,
    parameter THRESHOLDS = 0,
    parameter T_BITS = 1,
    parameter [COLUMNS*PE*((1<<THRESHOLDS)-(THRESHOLDS?1:0))*T_BITS-1:0] TABLE = 0,
    parameter DEPTH = 2,
    parameter WEIGHTS = "weights.hex",       // ROWS * COLUMNS words of PE * SIMD weights
    parameter BIASES = "biases.hex",         // COLUMNS words of PE
    parameter MULTIPLIERS = "multipliers.hex"  // COLUMNS * TURNS words of PE / TURNS
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [(EACH ? PE : SIMD)*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam STEPS = ROWS * COLUMNS;
  localparam RB = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam CB = COLUMNS > 1 ? $clog2(COLUMNS) : 1;
  localparam SB = STEPS > 1 ? $clog2(STEPS) : 1;
  localparam XB = (EACH ? PE : SIMD) * X_BITS;
  localparam [RB-1:0] LAST_ROW = ROWS - 1;
  localparam [CB-1:0] LAST_COLUMN = COLUMNS - 1;
  localparam [SB-1:0] LAST_STEP = STEPS - 1;

  // The sequencer.
  reg [RB-1:0] row;
  reg [CB-1:0] column;
  reg [SB-1:0] step;
  wire room;
  wire takes = EACH || column == 0;
  wire last_row = row == LAST_ROW;
  wire ready = room | ~last_row;
  wire go = ready & (s_valid | ~takes);
  wire done = go & last_row;
  assign s_ready = ready & takes;

  always @(posedge clk) begin
    if (go) begin
      step <= step == LAST_STEP ? {SB{1'b0}} : step + 1'b1;
      row <= last_row ? {RB{1'b0}} : row + 1'b1;
      if (last_row) column <= column == LAST_COLUMN ? {CB{1'b0}} : column + 1'b1;
    end
    if (rst) begin
      step <= 0;
      row <= 0;
      column <= 0;
    end
  end

  // Fetch.
  reg [PE*SIMD*W_BITS-1:0] weights[0:STEPS-1];
  reg [PE*SIMD*W_BITS-1:0] w;
  reg [XB-1:0] x;
  initial $readmemh(WEIGHTS, weights);
  always @(posedge clk) w <= weights[step];
  generate
    if (COLUMNS > 1 && !EACH) begin : replay
      reg [XB-1:0] kept[0:ROWS-1];
      always @(posedge clk) begin
        if (go & takes) kept[row] <= s_data;
        x <= takes ? s_data : kept[row];
      end
    end else begin : stream
      always @(posedge clk) x <= s_data;
    end
  endgenerate

  // Bias of the column that reaches the accumulator, multipliers of the sums that are scaled.
  localparam WORDS = COLUMNS * TURNS;
  localparam MB = WORDS > 1 ? $clog2(WORDS) : 1;
  localparam MW = PE / TURNS * M_BITS;
  reg [PE*A_BITS-1:0] biases[0:COLUMNS-1];
  reg [MW-1:0] multipliers[0:WORDS-1];
  reg [PE*A_BITS-1:0] bias;
  reg [MW-1:0] multiplier;
  reg [CB-1:0] bias_column;
  reg [MB-1:0] word;
  wire advance, turn;
  initial $readmemh(BIASES, biases);
  initial if (MULTIPLY) $readmemh(MULTIPLIERS, multipliers);
  always @(posedge clk) begin
    bias <= biases[bias_column];
    multiplier <= multipliers[word];
    if (advance) bias_column <= bias_column == LAST_COLUMN ? {CB{1'b0}} : bias_column + 1'b1;
    if (turn) word <= word == WORDS - 1 ? {MB{1'b0}} : word + 1'b1;
    if (rst) begin
      bias_column <= 0;
      word <= 0;
    end
  end

  wire push;
  wire [PE*Y_BITS-1:0] y;
  mac_array #(
      .SIMD(SIMD),
      .PE(PE),
      .EACH(EACH),
      .X_BITS(X_BITS),
      .X_SIGNED(X_SIGNED),
      .W_BITS(W_BITS),
      .W_SIGNED(W_SIGNED),
      .STYLE(STYLE),
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
      .TURNS(TURNS),
      .THRESHOLDS(THRESHOLDS),
      .COLUMNS(COLUMNS),
      .T_BITS(T_BITS),
      .TABLE(TABLE)
  ) macs (
      .clk(clk),
      .rst(rst),
      .go(go),
      .done(done),
      .x(x),
      .w(w),
      .bias(bias),
      .multiplier(multiplier),
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
