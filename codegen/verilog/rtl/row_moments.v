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
    parameter MULTIPLIED = 4,  // cycles of multiply.v for the sum of squares
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
  localparam TREE = 3 + $clog2(PE);  // three to square
  localparam OUT = TREE + MULTIPLIED + 6;
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

  wire [PE*XS-1:0] x;
  reg [3*PE*XS-1:0] x_late;
  wire [PE*2*XS-1:0] square;
  wire signed [S_BITS-1:0] part;
  wire signed [Q_BITS-1:0] part_square;
  always @(posedge clk) x_late <= {x_late, x};
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      assign x[p*XS+:XS] = {X_SIGNED ? s_data[p*X_BITS+X_BITS-1] : 1'b0, s_data[p*X_BITS+:X_BITS]};
      multiply #(
          .A_BITS(XS),
          .B_BITS(XS),
          .P_BITS(2 * XS)
      ) unit (
          .clk(clk),
          .a(x[p*XS+:XS]),
          .b(x[p*XS+:XS]),
          .p(square[p*2*XS+:2*XS])
      );
    end
  endgenerate
  adder_tree #(
      .N(PE),
      .WIDTH(XS),
      .LIMIT(S_BITS)
  ) sum_tree (
      .clk(clk),
      .x(x_late[2*PE*XS+:PE*XS]),
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

  // The accumulators hold the sums of a row when last[TREE + 1]; their products, then five cycles turn them into a beat.
  reg signed [S_BITS-1:0] s1;
  reg [(MULTIPLIED+5)*S_BITS-1:0] s1_late;
  reg signed [Q_BITS-1:0] s2;
  wire signed [V_BITS:0] sum_product, square_of_sum;
  generate
    if (C & (C - 1)) begin : times
      scale_by #(
          .X_BITS(Q_BITS),
          .M_BITS($clog2(C + 1) + 1),
          .SCALE(C),
          .Y_BITS(V_BITS + 1)
      ) unit (
          .clk(clk),
          .x(s2),
          .y(sum_product)
      );
    end else begin : shift
      reg [MULTIPLIED*Q_BITS-1:0] s2_late;
      always @(posedge clk) s2_late <= {s2_late, s2};
      assign sum_product = $signed(s2_late[(MULTIPLIED-1)*Q_BITS+:Q_BITS]) * C;
    end
    if (CENTRED) begin : mean_square
      localparam W_BITS = Q_BITS > S_BITS ? Q_BITS : S_BITS;  // as many cycles as the other product
      wire signed [W_BITS-1:0] s1_wide = s1;
      multiply #(
          .A_BITS(W_BITS),
          .B_BITS(S_BITS),
          .P_BITS(V_BITS + 1)
      ) unit (
          .clk(clk),
          .a(s1_wide),
          .b(s1),
          .p(square_of_sum)
      );
    end else begin : no_mean
      assign square_of_sum = 0;
    end
  endgenerate
  reg [V_BITS-1:0] scaled, mean, v, v_late;
  reg [K_BITS-1:0] k, k_late, k_out;
  reg [F+1:0] index;
  reg [R_BITS-1:0] root;
  reg [R_BITS-1:0] roots[0:(4<<F)-1];  // of a row only the first three quarters are read
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
    s1_late <= {s1_late, s1};
    scaled <= sum_product + EPSILON;
    mean <= square_of_sum;
    v <= scaled - mean;
    k <= found;
    v_late <= v;
    index <= shifted - (1 << F);
    k_late <= k;
    root <= roots[index];
    k_out <= k_late;
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
      .push_data({k_out, root, s1_late[(MULTIPLIED+4)*S_BITS+:S_BITS]}),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
