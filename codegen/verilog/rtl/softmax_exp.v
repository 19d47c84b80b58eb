// table[largest - x]: the exponentials of a row of BEATS beats (a), given its largest element (b, one beat per row).
module softmax_exp #(
    parameter PE = 1,
    parameter BEATS = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter E_BITS = 13,
    parameter DEPTH = 2,
    parameter TABLE = "table.hex"  // 2^X_BITS words
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [PE*X_BITS-1:0] a_data,
    input b_valid,
    output b_ready,
    input [X_BITS-1:0] b_data,
    output m_valid,
    input m_ready,
    output [PE*E_BITS-1:0] m_data
);
  localparam B = BEATS > 1 ? $clog2(BEATS) : 1;
  reg [B-1:0] beat;
  reg [2:1] valid;
  reg [X_BITS-1:0] held;
  wire room;
  wire first = beat == 0;
  wire go = a_valid & room & (b_valid | ~first);
  assign a_ready = room & (b_valid | ~first);
  assign b_ready = room & a_valid & first;
  always @(posedge clk) begin
    valid <= {valid, go};
    if (go) begin
      beat <= beat == BEATS - 1 ? {B{1'b0}} : beat + 1'b1;
      if (first) held <= b_data;
    end
    if (rst) begin
      beat <= 0;
      valid <= 0;
    end
  end

  wire [X_BITS-1:0] largest = first ? b_data : held;
  wire [PE*E_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      reg [E_BITS-1:0] entries[0:(1<<X_BITS)-1];
      reg [X_BITS-1:0] distance;
      reg [E_BITS-1:0] e;
      initial $readmemh(TABLE, entries);
      always @(posedge clk) begin
        distance <= largest - a_data[p*X_BITS+:X_BITS];
        e <= entries[distance];
      end
      assign y[p*E_BITS+:E_BITS] = e;
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * E_BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(valid[2]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
