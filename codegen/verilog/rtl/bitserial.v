// The matrix-vector unit with weights a bit at a time: no multiplier, and any width of weights by the same hardware.
//
// Sums are formed group by group of ROWS * SIMD channels, in a group plane by plane of the weights from the highest bit on, each
// plane worth twice the next one. With SCALES, the sum of a group is then multiplied by the scale of the group, a bit of it per
// cycle while the next group is under way, and added to the total: weights are dequantized after the sum (Chen et al., "BitMoD:
// Bit-serial Mixture-of-Datatype LLM Acceleration" (2025)). ROWS * PLANES must not be less than S_BITS then.
//
// A token takes COLUMNS * GROUPS * PLANES * ROWS steps. Channels are read with the first plane of the first column and kept.
module bitserial #(
    parameter ROWS = 1,    // of a group
    parameter PLANES = 4,  // bits of weights
    parameter GROUPS = 1,
    parameter WORDS = 1,   // of SIMD channels; the last group may have fewer than ROWS, and weights of zero there
    parameter COLUMNS = 1,  // N / PE
    parameter SIMD = 1,
    parameter PE = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter W_SIGNED = 1,
    parameter P_BITS = 16,  // sum of a group
    parameter SCALES = 0,
    parameter S_BITS = 9,   // scales of groups, signed
    parameter A_BITS = 24,  // sum of all
    parameter MULTIPLY = 1,
    parameter SCALED = 5,  // cycles of requantize.v
    parameter M_BITS = 16,
    parameter Q_BITS = 32,
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
    parameter WEIGHTS = "weights.hex",          // by column, group, plane and row: words of PE * SIMD bits
    parameter GROUP_SCALES = "scales.hex",      // COLUMNS * GROUPS words of PE
    parameter BIASES = "biases.hex",            // COLUMNS words of PE
    parameter MULTIPLIERS = "multipliers.hex"   // COLUMNS * TURNS words of PE / TURNS
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
  localparam STEPS = COLUMNS * GROUPS * PLANES * ROWS;
  localparam SCALE_WORDS = COLUMNS * TURNS;
  localparam SB = STEPS > 1 ? $clog2(STEPS) : 1;
  localparam RB = ROWS > 1 ? $clog2(ROWS) : 1;
  localparam PB = PLANES > 1 ? $clog2(PLANES) : 1;
  localparam GB = GROUPS > 1 ? $clog2(GROUPS) : 1;
  localparam CB = COLUMNS > 1 ? $clog2(COLUMNS) : 1;
  localparam KB = GROUPS * ROWS > 1 ? $clog2(GROUPS * ROWS) : 1;
  localparam MB = SCALE_WORDS > 1 ? $clog2(SCALE_WORDS) : 1;
  localparam LB = GROUPS * COLUMNS > 1 ? $clog2(GROUPS * COLUMNS) : 1;
  localparam XS = X_BITS + (X_SIGNED ? 0 : 1);
  localparam PAIRS = (SIMD + 1) / 2;
  localparam MW = PE / TURNS * M_BITS;
  // Cycles from a step to the registers: fetch, pairs, tree, sum of the group, its multiplication, total.
  localparam TREE = 2 + $clog2(PAIRS);
  localparam GROUPED = TREE + 1;
  localparam STORED = GROUPED + 1 + (SCALES ? S_BITS : 0);
  localparam CAPTURE = TURNS > 1 && THRESHOLDS ? 1 : 0;
  localparam OUT = STORED + CAPTURE + TURNS - 1 + (THRESHOLDS ? THRESHOLDS : SCALED);

  // The sequencer.
  reg [SB-1:0] step;
  reg [RB-1:0] row;
  reg [PB-1:0] plane;
  reg [GB-1:0] group;
  reg [CB-1:0] column;
  reg [KB-1:0] start;  // first row of the group
  wire [KB-1:0] place = start + row;
  wire room;
  wire last_row = row == ROWS - 1;
  wire last_plane = last_row & plane == PLANES - 1;
  wire last_group = last_plane & group == GROUPS - 1;
  wire takes = column == 0 && plane == 0 && (WORDS == GROUPS * ROWS || place < WORDS);
  wire ready = room | ~last_group;
  wire go = ready & (s_valid | ~takes);
  assign s_ready = ready & takes;

  // [i]: what the step that began i cycles ago was.
  reg [GROUPED:1] valid, opens, sign, ends;  // opens a plane, belongs to the sign, ends a group
  reg [GROUPED:1] fresh;                     // first plane of a group
  reg [OUT:1] last;
  always @(posedge clk) begin
    valid <= {valid, go};
    opens <= {opens, row == 0};
    fresh <= {fresh, plane == 0};
    sign <= {sign, W_SIGNED && plane == 0};
    ends <= {ends, go & last_plane};
    last <= {last, go & last_group};
    if (go) begin
      step <= step == STEPS - 1 ? {SB{1'b0}} : step + 1'b1;
      row <= last_row ? {RB{1'b0}} : row + 1'b1;
      if (last_row) plane <= last_plane ? {PB{1'b0}} : plane + 1'b1;
      if (last_plane) begin
        group <= last_group ? {GB{1'b0}} : group + 1'b1;
        start <= last_group ? {KB{1'b0}} : start + ROWS;
      end
      if (last_group) column <= column == COLUMNS - 1 ? {CB{1'b0}} : column + 1'b1;
    end
    if (rst) begin
      valid <= 0;
      ends <= 0;
      last <= 0;
      step <= 0;
      row <= 0;
      plane <= 0;
      group <= 0;
      start <= 0;
      column <= 0;
    end
  end

  // Fetch.
  reg [PE*SIMD-1:0] weights[0:STEPS-1];
  reg [PE*SIMD-1:0] w;
  reg [SIMD*X_BITS-1:0] x;
  initial $readmemh(WEIGHTS, weights);
  always @(posedge clk) w <= weights[step];
  generate
    if (COLUMNS * PLANES > 1) begin : replay
      reg [SIMD*X_BITS-1:0] kept[0:GROUPS*ROWS-1];
      always @(posedge clk) begin
        if (go & takes) kept[place] <= s_data;
        x <= takes ? s_data : kept[place];
      end
    end else begin : stream
      always @(posedge clk) x <= s_data;
    end
  endgenerate

  // Scales of the group that was summed up, bias of the column that begins, multipliers of the sums that are scaled.
  reg [PE*A_BITS-1:0] biases[0:COLUMNS-1];
  reg [MW-1:0] multipliers[0:SCALE_WORDS-1];
  reg [PE*A_BITS-1:0] bias;
  reg [MW-1:0] multiplier;
  reg [CB-1:0] bias_column;
  reg [MB-1:0] word;
  reg begins;  // the next group is the first one of its sum
  wire turn;
  wire ended = ends[GROUPED];  // the sums of a group are whole
  initial $readmemh(BIASES, biases);
  initial if (MULTIPLY) $readmemh(MULTIPLIERS, multipliers);
  always @(posedge clk) begin
    bias <= biases[bias_column];
    multiplier <= multipliers[word];
    if (ended) begins <= last[GROUPED];
    if (last[TREE]) bias_column <= bias_column == COLUMNS - 1 ? {CB{1'b0}} : bias_column + 1'b1;
    if (turn) word <= word == SCALE_WORDS - 1 ? {MB{1'b0}} : word + 1'b1;
    if (rst) begin
      bias_column <= 0;
      word <= 0;
      begins <= 1'b1;
    end
  end

  wire [PE*S_BITS-1:0] scale;
  genvar p, s;
  generate
    if (SCALES) begin : scales
      reg [PE*S_BITS-1:0] words[0:GROUPS*COLUMNS-1];
      reg [PE*S_BITS-1:0] word_r;
      reg [LB-1:0] index;
      initial $readmemh(GROUP_SCALES, words);
      always @(posedge clk) begin
        word_r <= words[index];
        if (ended) index <= index == GROUPS * COLUMNS - 1 ? {LB{1'b0}} : index + 1'b1;
        if (rst) index <= 0;
      end
      assign scale = word_r;
    end else begin : unscaled
      assign scale = 0;
    end
  endgenerate

  wire [PE*A_BITS-1:0] sums;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire [PAIRS*(XS+1)-1:0] pairs;
      wire signed [P_BITS-1:0] sum;
      for (s = 0; s < PAIRS; s = s + 1) begin : pair
        wire [X_BITS:0] x0 = {X_SIGNED ? x[2*s*X_BITS+X_BITS-1] : 1'b0, x[2*s*X_BITS+:X_BITS]};
        wire signed [XS-1:0] a = w[p*SIMD+2*s] ? x0[XS-1:0] : {XS{1'b0}};
        reg signed [XS:0] r;
        if (2 * s + 1 < SIMD) begin : two
          wire [X_BITS:0] x1 = {X_SIGNED ? x[(2*s+1)*X_BITS+X_BITS-1] : 1'b0, x[(2*s+1)*X_BITS+:X_BITS]};
          wire signed [XS-1:0] b = w[p*SIMD+2*s+1] ? x1[XS-1:0] : {XS{1'b0}};
          always @(posedge clk) r <= a + b;
        end else begin : one
          always @(posedge clk) r <= a;
        end
        assign pairs[s*(XS+1)+:XS+1] = r;
      end
      adder_tree #(
          .N(PAIRS),
          .WIDTH(XS + 1),
          .LIMIT(P_BITS)
      ) tree (
          .clk(clk),
          .x(pairs),
          .sum(sum)
      );
      reg signed [P_BITS-1:0] partial;
      wire signed [P_BITS-1:0] base = !opens[TREE] ? partial : fresh[TREE] ? {P_BITS{1'b0}} : partial <<< 1;
      always @(posedge clk) if (valid[TREE]) partial <= sign[TREE] ? base - sum : base + sum;

      reg signed [A_BITS-1:0] total;
      assign sums[p*A_BITS+:A_BITS] = total;
      if (SCALES) begin : dequantize
        // One bit of the scale per cycle, the lowest first; the highest is that of the sign.
        reg signed [A_BITS-1:0] addend;
        reg [S_BITS-1:0] rest;
        reg [S_BITS:1] at;  // [i]: bit i - 1 is added
        reg restart;
        reg signed [A_BITS-1:0] bias_r;
        wire signed [A_BITS-1:0] from = restart & at[1] ? bias_r : total;
        always @(posedge clk) begin
          at <= {at, ended};
          if (ended) begin
            addend <= partial;
            rest <= scale[p*S_BITS+:S_BITS];
            restart <= begins;
            bias_r <= bias[p*A_BITS+:A_BITS];
          end else begin
            addend <= addend <<< 1;
            rest <= rest >> 1;
          end
          if (|at) total <= !rest[0] ? from : at[S_BITS] ? from - addend : from + addend;
          if (rst) at <= 0;
        end
      end else begin : plain
        wire signed [A_BITS-1:0] start_of = bias[p*A_BITS+:A_BITS];
        always @(posedge clk) if (ended) total <= (begins ? start_of : total) + partial;
      end
    end
  endgenerate

  wire [PE*Y_BITS-1:0] y;
  scale_array #(
      .PE(PE),
      .TURNS(TURNS),
      .A_BITS(A_BITS),
      .MULTIPLY(MULTIPLY),
      .M_BITS(M_BITS),
      .Q_BITS(Q_BITS),
      .SHIFT(SHIFT),
      .ROUND(ROUND),
      .Y_BITS(Y_BITS),
      .CLAMP_LOW(CLAMP_LOW),
      .CLAMP_HIGH(CLAMP_HIGH),
      .LOW(LOW),
      .HIGH(HIGH),
      .THRESHOLDS(THRESHOLDS),
      .COLUMNS(COLUMNS),
      .T_BITS(T_BITS),
      .TABLE(TABLE)
  ) out (
      .clk(clk),
      .rst(rst),
      .soon(last[STORED-1]),
      .a(sums),
      .turn(turn),
      .multiplier(multiplier),
      .y(y)
  );

  credit_fifo #(
      .WIDTH(PE * Y_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & last_group),
      .push(last[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
