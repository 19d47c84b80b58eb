// What normalisation needs of a row of BEATS beats: S1 = sum(x) (0 unless CENTRED), and of v = C sum(x^2) - S1^2 + EPSILON the
// k with 4^k <= v < 4^(k+1) and the table entry for v / 4^k. A beat out is {k, root, S1}.
module row_moments #(
    parameter PE = 1,
    parameter BEATS = 1,
    parameter CENTRED = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter C = 1,         // elements of a row
    parameter S_BITS = 16,   // S1, signed
    parameter Q_BITS = 24,   // sum of squares, signed
    parameter V_BITS = 32,   // v, unsigned
    parameter K_BITS = 4,
    parameter LAST_K = 15,
    parameter F = 8,
    parameter R_BITS = 15,   // an entry of the table
    parameter EPSILON = 1,
    parameter DEPTH = 2,
    parameter ROOTS = "roots.hex"  // 3 * 2^F words
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [PE*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [K_BITS+R_BITS+S_BITS-1:0] m_data
);
  localparam TREE = 2 + $clog2(PE);  // a cycle to fetch, one to square
  localparam OUT = TREE + 6;
  localparam XS = X_BITS + 1;
  localparam B = BEATS > 1 ? $clog2(BEATS) : 1;
  reg [B-1:0] beat;
  reg [OUT:1] valid, last;
  reg first;
  wire room;
  wire end_row = beat == BEATS - 1;
  wire go = s_valid & s_ready;
  assign s_ready = room | ~end_row;
  always @(posedge clk) begin
    valid <= {valid, go};
    last <= {last, go & end_row};
    if (go) beat <= end_row ? {B{1'b0}} : beat + 1'b1;
    if (valid[TREE]) first <= last[TREE];
    if (rst) begin
      beat <= 0;
      valid <= 0;
      last <= 0;
      first <= 1'b1;
    end
  end

  reg [PE*XS-1:0] x, x_late;
  reg [PE*2*XS-1:0] square;
  wire signed [S_BITS-1:0] part;
  wire signed [Q_BITS-1:0] part_square;
  always @(posedge clk) x_late <= x;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [XS-1:0] xs = x[p*XS+:XS];
      always @(posedge clk) begin
        x[p*XS+:XS] <= {X_SIGNED ? s_data[p*X_BITS+X_BITS-1] : 1'b0, s_data[p*X_BITS+:X_BITS]};
        square[p*2*XS+:2*XS] <= xs * xs;
      end
    end
  endgenerate
  adder_tree #(
      .N(PE),
      .WIDTH(XS),
      .LIMIT(S_BITS)
  ) sum_tree (
      .clk(clk),
      .x(x_late),
      .sum(part)
  );
  adder_tree #(
      .N(PE),
      .WIDTH(2 * XS),
      .LIMIT(Q_BITS)
  ) square_tree (
      .clk(clk),
      .x(square),
      .sum(part_square)
  );

  // The accumulators hold the sums of a row when last[TREE + 1]; five cycles turn them into a beat.
  reg signed [S_BITS-1:0] s1, s1_1, s1_2, s1_3, s1_4, s1_5;
  reg signed [Q_BITS-1:0] s2;
  reg [V_BITS-1:0] scaled, mean, v, v_late;
  reg [K_BITS-1:0] k, k_late, k_out;
  reg [F+1:0] index;
  reg [R_BITS-1:0] root;
  reg [R_BITS-1:0] roots[0:(3<<F)-1];
  initial $readmemh(ROOTS, roots);

  reg [K_BITS-1:0] found;
  integer j;
  always @* begin
    found = 0;
    for (j = 1; j <= LAST_K; j = j + 1) if (|(v >> (2 * j))) found = j[K_BITS-1:0];
  end
  wire [V_BITS+F-1:0] shifted = {v_late, {F{1'b0}}} >> {k, 1'b0};

  always @(posedge clk) begin
    if (valid[TREE]) begin
      s1 <= CENTRED ? part + (first ? $signed({S_BITS{1'b0}}) : s1) : 0;
      s2 <= part_square + (first ? $signed({Q_BITS{1'b0}}) : s2);
    end
    scaled <= s2 * C + EPSILON;
    mean <= s1 * s1;
    s1_1 <= s1;
    v <= scaled - mean;
    s1_2 <= s1_1;
    k <= found;
    v_late <= v;
    s1_3 <= s1_2;
    index <= shifted - (1 << F);
    k_late <= k;
    s1_4 <= s1_3;
    root <= roots[index];
    k_out <= k_late;
    s1_5 <= s1_4;
  end

  credit_fifo #(
      .WIDTH(K_BITS + R_BITS + S_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go & end_row),
      .push(last[OUT]),
      .push_data({k_out, root, s1_5}),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
