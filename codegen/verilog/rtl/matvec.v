// The matrix-vector unit: y = requantize(x * W + bias), PE columns and SIMD rows of W at a time.
//
// A token takes ROWS * COLUMNS steps, a step per cycle. The first pass reads SIMD channels of x per step and keeps them, later
// passes replay them. The last step of every pass makes PE outputs. The pipeline never stops: a step waits in front of it.
module matvec #(
    parameter ROWS = 1,     // K / SIMD
    parameter COLUMNS = 1,  // N / PE
    parameter SIMD = 1,
    parameter PE = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter W_BITS = 4,
    parameter W_SIGNED = 1,
    parameter STYLE = 1,    // see product.v
    parameter P_BITS = 12,  // products
    parameter A_BITS = 16,  // accumulator, signed
    parameter MULTIPLY = 1,
    parameter M_BITS = 16,
    parameter Q_BITS = 32,  // accumulator times multiplier
    parameter SHIFT = 16,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter DEPTH = 2,
    parameter WEIGHTS = "weights.hex",       // ROWS * COLUMNS words of PE * SIMD weights
    parameter BIASES = "biases.hex",         // COLUMNS words of PE
    parameter MULTIPLIERS = "multipliers.hex"
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [SIMD*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam XS = X_BITS + (X_SIGNED ? 0 : 1);
  localparam TRIPLE = STYLE == 1 && W_BITS > (W_SIGNED ? 2 : 1);
  localparam PRODUCT = STYLE == 1 ? (W_BITS + 1) / 2 : 1;
  // Cycles from a step to the registers: 1 fetch, then perhaps 3x, the product, the tree, the accumulator.
  localparam SUMMED = 1 + TRIPLE + PRODUCT + $clog2(SIMD);
  localparam STORED = SUMMED + 1;
  localparam OUT = STORED + (MULTIPLY ? 2 : 0) + (SHIFT > 0 ? 1 : 0) + (CLAMP_LOW || CLAMP_HIGH ? 1 : 0);
  localparam STEPS = ROWS * COLUMNS;
  localparam RB = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam CB = COLUMNS > 1 ? $clog2(COLUMNS) : 1;
  localparam SB = STEPS > 1 ? $clog2(STEPS) : 1;
  localparam [RB-1:0] LAST_ROW = ROWS - 1;
  localparam [CB-1:0] LAST_COLUMN = COLUMNS - 1;
  localparam [SB-1:0] LAST_STEP = STEPS - 1;

  // The sequencer.
  reg [RB-1:0] row;
  reg [CB-1:0] column;
  reg [SB-1:0] step;
  wire room;
  wire first_pass = column == 0;
  wire last_row = row == LAST_ROW;
  wire ready = room | ~last_row;
  wire go = ready & (s_valid | ~first_pass);
  wire done = go & last_row;
  assign s_ready = ready & first_pass;

  reg [OUT:1] valid, last;  // [i]: the step that began i cycles ago
  always @(posedge clk) begin
    valid <= {valid, go};
    last <= {last, done};
    if (go) begin
      step <= step == LAST_STEP ? {SB{1'b0}} : step + 1'b1;
      row <= last_row ? {RB{1'b0}} : row + 1'b1;
      if (last_row) column <= column == LAST_COLUMN ? {CB{1'b0}} : column + 1'b1;
    end
    if (rst) begin
      step <= 0;
      row <= 0;
      column <= 0;
      valid <= 0;
      last <= 0;
    end
  end

  // Fetch.
  reg [PE*SIMD*W_BITS-1:0] weights[0:STEPS-1];
  reg [PE*SIMD*W_BITS-1:0] w;
  reg [SIMD*X_BITS-1:0] x;
  initial $readmemh(WEIGHTS, weights);
  always @(posedge clk) w <= weights[step];
  generate
    if (COLUMNS > 1) begin : replay
      reg [SIMD*X_BITS-1:0] kept[0:ROWS-1];
      always @(posedge clk) begin
        if (go & first_pass) kept[row] <= s_data;
        x <= first_pass ? s_data : kept[row];
      end
    end else begin : stream
      always @(posedge clk) x <= s_data;
    end
  endgenerate

  // Bias and multiplier of the column that reaches the accumulator.
  reg [PE*A_BITS-1:0] biases[0:COLUMNS-1];
  reg [PE*M_BITS-1:0] multipliers[0:COLUMNS-1];
  reg [PE*A_BITS-1:0] bias;
  reg [PE*M_BITS-1:0] multiplier;
  reg [CB-1:0] bias_column, multiplier_column;
  reg first;
  initial $readmemh(BIASES, biases);
  initial if (MULTIPLY) $readmemh(MULTIPLIERS, multipliers);
  always @(posedge clk) begin
    bias <= biases[bias_column];
    multiplier <= multipliers[multiplier_column];
    multiplier_column <= bias_column;
    if (last[SUMMED-1]) bias_column <= bias_column == LAST_COLUMN ? {CB{1'b0}} : bias_column + 1'b1;
    if (valid[SUMMED]) first <= last[SUMMED];
    if (rst) begin
      bias_column <= 0;
      first <= 1'b1;
    end
  end

  // Inputs of the products, and 3x, shared by all PE.
  wire [SIMD*XS-1:0] px;
  wire [SIMD*(XS+2)-1:0] pt;
  wire [PE*SIMD*W_BITS-1:0] pw;
  genvar s, p;
  generate
    for (s = 0; s < SIMD; s = s + 1) begin : lane
      wire [X_BITS:0] extended = {X_SIGNED ? x[s*X_BITS+X_BITS-1] : 1'b0, x[s*X_BITS+:X_BITS]};
      wire signed [XS-1:0] xs = extended[XS-1:0];
      if (TRIPLE) begin : triple
        reg signed [XS-1:0] x_r;
        reg signed [XS+1:0] t_r;
        always @(posedge clk) begin
          x_r <= xs;
          t_r <= xs + (xs <<< 1);
        end
        assign px[s*XS+:XS] = x_r;
        assign pt[s*(XS+2)+:XS+2] = t_r;
      end else begin : single
        assign px[s*XS+:XS] = xs;
        assign pt[s*(XS+2)+:XS+2] = 0;
      end
    end
    if (TRIPLE) begin : delay_w
      reg [PE*SIMD*W_BITS-1:0] w_r;
      always @(posedge clk) w_r <= w;
      assign pw = w_r;
    end else begin : direct_w
      assign pw = w;
    end
  endgenerate

  // Products, their sum, the accumulator, the output.
  wire [PE*Y_BITS-1:0] y;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire [SIMD*P_BITS-1:0] products;
      wire signed [A_BITS-1:0] sum;
      for (s = 0; s < SIMD; s = s + 1) begin : element
        product #(
            .X_BITS(XS),
            .W_BITS(W_BITS),
            .W_SIGNED(W_SIGNED),
            .P_BITS(P_BITS),
            .STYLE(STYLE)
        ) multiply (
            .clk(clk),
            .x(px[s*XS+:XS]),
            .triple(pt[s*(XS+2)+:XS+2]),
            .w(pw[(p*SIMD+s)*W_BITS+:W_BITS]),
            .p(products[s*P_BITS+:P_BITS])
        );
      end
      adder_tree #(
          .N(SIMD),
          .WIDTH(P_BITS),
          .LIMIT(A_BITS)
      ) tree (
          .clk(clk),
          .x(products),
          .sum(sum)
      );
      reg signed [A_BITS-1:0] accumulator;
      wire signed [A_BITS-1:0] start = bias[p*A_BITS+:A_BITS];
      always @(posedge clk) if (valid[SUMMED]) accumulator <= sum + (first ? start : accumulator);
      requantize #(
          .A_BITS(A_BITS),
          .MULTIPLY(MULTIPLY),
          .M_BITS(M_BITS),
          .P_BITS(Q_BITS),
          .SHIFT(SHIFT),
          .Y_BITS(Y_BITS),
          .CLAMP_LOW(CLAMP_LOW),
          .CLAMP_HIGH(CLAMP_HIGH),
          .LOW(LOW),
          .HIGH(HIGH)
      ) out (
          .clk(clk),
          .a(accumulator),
          .m(multiplier[p*M_BITS+:M_BITS]),
          .y(y[p*Y_BITS+:Y_BITS])
      );
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(done),
      .push(last[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
