// Slides a window over an image that streams through: every element of every window, in the order of four nested loops.
//
// Words (some channels of a pixel) are written to a ring of SIZE of them. Reading goes through the image by additions only: at
// every step one of the loops advances and those inside it begin anew, which adds a constant to the position in the ring
// (relative to the first row kept, `base`) and to the row and column of the image. Outside the image PAD is read. When a row of
// windows is complete, the rows above the next one are released. `kept` counts words from `base` on; it is negative while
// rows that no window reads have yet to come.
module window #(
    parameter WIDTH = 8,   // bits of a word
    parameter SIZE = 16,   // words kept, a power of two
    parameter HEIGHT = 1,  // of the image
    parameter COLUMNS = 1,
    parameter N0 = 1,      // iterations of the loops, the innermost first; the last one runs over a row of windows
    parameter N1 = 1,
    parameter N2 = 1,
    parameter N3 = 1,
    parameter N4 = 1,      // rows of windows
    parameter signed [31:0] R0 = 0,   // what an advance of loop i adds to the position in the ring,
    parameter signed [31:0] R1 = 0,
    parameter signed [31:0] R2 = 0,
    parameter signed [31:0] R3 = 0,
    parameter signed [31:0] Y0 = 0,   // to the row,
    parameter signed [31:0] Y1 = 0,
    parameter signed [31:0] Y2 = 0,
    parameter signed [31:0] Y3 = 0,
    parameter signed [31:0] X0 = 0,   // and to the column
    parameter signed [31:0] X1 = 0,
    parameter signed [31:0] X2 = 0,
    parameter signed [31:0] X3 = 0,
    parameter P = 16,                 // bits of positions, rows and columns, signed
    parameter Y = 16,
    parameter X = 16,
    parameter STRIDE = 1,             // rows from one row of windows to the next
    parameter TOP = 0,                // rows and columns outside
    parameter LEFT = 0,
    parameter ROW = 1,                // words of a row of the image
    parameter RELEASE_FIRST = 0,      // words released by the first row of windows that begins inside
    parameter RELEASE_LAST = 1,       // and by the last one
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
  localparam STEP = ROW / COLUMNS;  // words of a pixel
  localparam signed [31:0] START = -TOP * ROW - LEFT * STEP;
  localparam A = SIZE > 1 ? $clog2(SIZE) : 1;
  localparam B0 = N0 > 1 ? $clog2(N0) : 1;
  localparam B1 = N1 > 1 ? $clog2(N1) : 1;
  localparam B2 = N2 > 1 ? $clog2(N2) : 1;
  localparam B3 = N3 > 1 ? $clog2(N3) : 1;
  localparam B4 = N4 > 1 ? $clog2(N4) : 1;

  reg [WIDTH-1:0] ring[0:SIZE-1];
  reg [A-1:0] head, base;
  reg signed [P-1:0] kept, position;
  reg signed [Y-1:0] row, first_row;
  reg signed [X-1:0] column;
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
  wire end_row = last0 & last1 & last2 & last3;

  reg fresh;  // a frame begins; even what lies outside waits for its first word
  wire room;
  wire outside = row < 0 || row >= HEIGHT || column < 0 || column >= COLUMNS;
  wire go = room & (outside ? !fresh || kept > 0 : position < kept);
  wire take = s_valid & s_ready;
  assign s_ready = kept < $signed(SIZE);

  wire signed [Y-1:0] next_row = first_row + $signed(STRIDE);
  wire signed [P-1:0] released = last4 ? RELEASE_LAST : first_row >= 0 ? STRIDE * ROW : next_row >= 0 ? RELEASE_FIRST : 0;

  always @(posedge clk) begin
    if (take) begin
      ring[head] <= s_data;
      head <= head + 1'b1;
    end
    kept <= kept + $signed({1'b0, take}) - (go & end_row ? released : $signed({P{1'b0}}));
    if (go) begin
      fresh <= end_row & last4;
      i0 <= last0 ? {B0{1'b0}} : i0 + 1'b1;
      if (last0) i1 <= last1 ? {B1{1'b0}} : i1 + 1'b1;
      if (last0 & last1) i2 <= last2 ? {B2{1'b0}} : i2 + 1'b1;
      if (last0 & last1 & last2) i3 <= last3 ? {B3{1'b0}} : i3 + 1'b1;
      if (!last0) begin
        position <= position + R0;
        row <= row + Y0;
        column <= column + X0;
      end else if (!last1) begin
        position <= position + R1;
        row <= row + Y1;
        column <= column + X1;
      end else if (!last2) begin
        position <= position + R2;
        row <= row + Y2;
        column <= column + X2;
      end else if (!last3) begin
        position <= position + R3;
        row <= row + Y3;
        column <= column + X3;
      end else begin
        i4 <= last4 ? {B4{1'b0}} : i4 + 1'b1;
        base <= base + released[A-1:0];
        column <= -LEFT;
        first_row <= last4 ? -TOP : next_row;
        row <= last4 ? -TOP : next_row;
        position <= last4 ? START : next_row < 0 ? next_row * ROW - LEFT * STEP : -LEFT * STEP;
      end
    end
    if (rst) begin
      fresh <= 1'b1;
      head <= 0;
      base <= 0;
      kept <= 0;
      position <= START;
      row <= -TOP;
      first_row <= -TOP;
      column <= -LEFT;
      i0 <= 0;
      i1 <= 0;
      i2 <= 0;
      i3 <= 0;
      i4 <= 0;
    end
  end

  reg [A-1:0] address;
  reg [WIDTH-1:0] word;
  reg [2:1] valid, padded;
  always @(posedge clk) begin
    address <= base + position[A-1:0];
    word <= ring[address];
    valid <= {valid, go};
    padded <= {padded, outside};
    if (rst) valid <= 0;
  end

  credit_fifo #(
      .WIDTH(WIDTH),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(valid[2]),
      .push_data(padded[2] ? PAD : word),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
