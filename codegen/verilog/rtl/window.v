// Slides a window over an image that streams through: every element of every window, in the order of five nested loops.
//
// Words (some channels of a pixel) are written to a ring of SIZE of them. Reading goes through the image by additions only: at
// every step one of the loops advances and those inside it begin anew, which adds a constant to the position and to the row
// and column of the image. Positions and the number of words written count on from frame to frame, so their lowest bits are
// addresses of the ring. Outside the image PAD is read. When a row of windows is complete, the rows above the next one are
// released. `kept` counts words not released; it is negative while rows that no window reads have yet to come.
//
// Steps are worked out ahead: `position`, `row` and `column` belong to the step after next, n_ to the next one, c_ to the one
// that begins when its word is there and the FIFO has room. The first step of a frame waits for the first word of it; its
// `position` is that word's, since what it reads is either that word or outside.
module window #(
    parameter WIDTH = 8,   // bits of a word
    parameter SIZE = 16,   // words kept, a power of two
    parameter HEIGHT = 1,  // of the image
    parameter COLUMNS = 1,
    parameter N0 = 1,      // iterations of the loops, the innermost first; N3 runs over a row of windows, N4 over rows of windows
    parameter N1 = 1,
    parameter N2 = 1,
    parameter N3 = 1,
    parameter N4 = 1,
    parameter signed [31:0] R0 = 0,   // what an advance of loop i adds to the position,
    parameter signed [31:0] R1 = 0,
    parameter signed [31:0] R2 = 0,
    parameter signed [31:0] R3 = 0,
    parameter signed [31:0] R4 = 0,
    parameter signed [31:0] R5 = 0,   // the step to the next frame,
    parameter signed [31:0] RF = 0,   // and the first step of a frame
    parameter signed [31:0] Y0 = 0,   // to the row,
    parameter signed [31:0] Y1 = 0,
    parameter signed [31:0] Y2 = 0,
    parameter signed [31:0] Y3 = 0,
    parameter signed [31:0] Y4 = 0,
    parameter signed [31:0] Y5 = 0,
    parameter signed [31:0] X0 = 0,   // and to the column
    parameter signed [31:0] X1 = 0,
    parameter signed [31:0] X2 = 0,
    parameter signed [31:0] X3 = 0,
    parameter signed [31:0] X4 = 0,   // also to the next frame
    parameter P = 16,                 // bits of positions, rows and columns, signed
    parameter Y = 16,
    parameter X = 16,
    parameter TOP = 0,                // rows and columns outside
    parameter LEFT = 0,
    parameter SKIP = 0,               // rows of windows that release nothing,
    parameter FINAL = 0,              // the one after which nothing is left
    parameter RELEASE_FIRST = 0,      // words released by row SKIP,
    parameter RELEASE = 1,            // by the next ones
    parameter RELEASE_LAST = 1,       // and by row FINAL
    parameter [WIDTH-1:0] PAD = 0,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [WIDTH-1:0] s_data,
    output m_valid,
    input m_ready,
    output [WIDTH-1:0] m_data
);
  localparam A = SIZE > 1 ? $clog2(SIZE) : 1;
  localparam B0 = N0 > 1 ? $clog2(N0) : 1;
  localparam B1 = N1 > 1 ? $clog2(N1) : 1;
  localparam B2 = N2 > 1 ? $clog2(N2) : 1;
  localparam B3 = N3 > 1 ? $clog2(N3) : 1;
  localparam B4 = N4 > 1 ? $clog2(N4) : 1;
  localparam [1:0] NOTHING = 0, FIRST = 1, OTHER = 2, LAST = 3;

  reg [WIDTH-1:0] ring[0:SIZE-1];
  reg signed [P-1:0] written, kept, released;
  wire full = kept[A] & ~kept[P-1];
  wire take = s_valid & s_ready;
  assign s_ready = ~full;

  // The walk through the image.
  reg signed [P-1:0] position;
  reg signed [Y-1:0] row;
  reg signed [X-1:0] column;
  reg fresh;  // a frame begins
  reg [B0-1:0] i0;
  reg [B1-1:0] i1;
  reg [B2-1:0] i2;
  reg [B3-1:0] i3;
  reg [B4-1:0] i4;
  wire last0 = i0 == N0 - 1;
  wire last1 = i1 == N1 - 1;
  wire last2 = i2 == N2 - 1;
  wire last3 = i3 == N3 - 1;
  wire last4 = i4 == N4 - 1;
  wire end1 = last0 & last1;
  wire end2 = end1 & last2;
  wire end3 = end2 & last3;
  wire end4 = end3 & last4;
  wire [31:0] by_row = end4 ? Y5 : end3 ? Y4 : end2 ? Y3 : end1 ? Y2 : last0 ? Y1 : Y0;
  wire [31:0] by_column = end3 ? X4 : end2 ? X3 : end1 ? X2 : last0 ? X1 : X0;
  wire [31:0] by = end4 ? R5 : fresh ? RF : end3 ? R4 : end2 ? R3 : end1 ? R2 : last0 ? R1 : R0;

  wire room;
  reg c_ready, c_valid;
  wire go = c_ready & room;
  wire advance = go | ~c_valid;

  always @(posedge clk) begin
    if (advance) begin
      position <= position + $signed(by[P-1:0]);
      row <= row + $signed(by_row[Y-1:0]);
      column <= column + $signed(by_column[X-1:0]);
      fresh <= end4;
      i0 <= last0 ? {B0{1'b0}} : i0 + 1'b1;
      if (last0) i1 <= last1 ? {B1{1'b0}} : i1 + 1'b1;
      if (end1) i2 <= last2 ? {B2{1'b0}} : i2 + 1'b1;
      if (end2) i3 <= last3 ? {B3{1'b0}} : i3 + 1'b1;
      if (end3) i4 <= last4 ? {B4{1'b0}} : i4 + 1'b1;
    end
    if (rst) begin
      position <= 0;
      row <= -TOP;
      column <= -LEFT;
      fresh <= 1'b1;
      i0 <= 0;
      i1 <= 0;
      i2 <= 0;
      i3 <= 0;
      i4 <= 0;
    end
  end

  // The next step and the one to begin.
  reg signed [P-1:0] n_position, c_position;
  reg n_valid, n_outside, n_free, c_outside;
  reg [1:0] n_release, c_release;
  wire outside = row < 0 || row >= HEIGHT || column < 0 || column >= COLUMNS;
  wire signed [P-1:0] n_ahead = n_position - written, c_ahead = c_position - written;

  always @(posedge clk) begin
    c_ready <= advance ? n_valid & (n_free | n_ahead[P-1]) : c_ready | c_ahead[P-1];
    if (advance) begin
      n_position <= position;
      n_outside <= outside;
      n_free <= outside & ~fresh;
      n_release <= !end3 || i4 < SKIP || i4 > FINAL ? NOTHING : i4 == SKIP ? FIRST : i4 == FINAL ? LAST : OTHER;
      n_valid <= 1'b1;
      c_position <= n_position;
      c_outside <= n_outside;
      c_release <= n_release;
      c_valid <= n_valid;
    end
    if (rst) begin
      n_valid <= 1'b0;
      c_valid <= 1'b0;
      c_ready <= 1'b0;
    end
  end

  // Words come, are read and go.
  reg [WIDTH-1:0] word, late_word;  // the first is the register of the memory, which is slow
  reg [2:1] push, padded;
  always @(posedge clk) begin
    if (take) begin
      ring[written[A-1:0]] <= s_data;
      written <= written + 1'b1;
    end
    word <= ring[c_position[A-1:0]];
    late_word <= word;
    padded <= {padded, c_outside};
    push <= {push, go};
    released <= !go || c_release == NOTHING ? 0 : c_release == FIRST ? RELEASE_FIRST : c_release == OTHER ? RELEASE : RELEASE_LAST;
    kept <= kept + $signed({1'b0, take}) - released;
    if (rst) begin
      written <= 0;
      kept <= 0;
      released <= 0;
      push <= 0;
    end
  end

  credit_fifo #(
      .WIDTH(WIDTH),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(push[2]),
      .push_data(padded[2] ? PAD : late_word),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
