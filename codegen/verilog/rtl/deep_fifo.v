// A FIFO in block memory. A word is offered 3 cycles after it was pushed: it is written, read into the register of the memory, and
// written to `front`, four places from which words are popped. A place of `front` is reserved when a read begins; four cover the
// three cycles from a pop to the word read because of it, so words follow one another every cycle.
module deep_fifo #(
    parameter WIDTH = 8,
    parameter DEPTH = 128
) (
    input clk,
    input rst,
    input push,
    input [WIDTH-1:0] push_data,
    output m_valid,
    input m_ready,
    output [WIDTH-1:0] m_data
);
  localparam POINTER = $clog2(DEPTH);
  localparam COUNT = $clog2(DEPTH + 1);
  localparam [POINTER-1:0] LAST = DEPTH - 1;

  (* no_rw_check *)  // a word is read after it was written, and its place is free after it was read
  reg [WIDTH-1:0] memory[0:DEPTH-1];
  reg [WIDTH-1:0] word;
  reg [POINTER-1:0] head, tail;
  reg [COUNT-1:0] stored;
  reg [WIDTH-1:0] front[0:3];
  reg [1:0] front_head, front_tail;
  reg [2:0] free, held;
  reg arrives;
  wire read = stored != 0 & free != 0;
  wire pop = m_valid & m_ready;
  assign m_valid = held != 0;
  assign m_data = front[front_tail];

  always @(posedge clk) begin
    if (push) begin
      memory[head] <= push_data;
      head <= head == LAST ? {POINTER{1'b0}} : head + 1'b1;
    end
    if (read) begin
      word <= memory[tail];
      tail <= tail == LAST ? {POINTER{1'b0}} : tail + 1'b1;
    end
    arrives <= read;
    if (arrives) begin
      front[front_head] <= word;
      front_head <= front_head + 1'b1;
    end
    if (pop) front_tail <= front_tail + 1'b1;
    if (push != read) stored <= push ? stored + 1'b1 : stored - 1'b1;
    if (read != pop) free <= pop ? free + 1'b1 : free - 1'b1;
    if (arrives != pop) held <= arrives ? held + 1'b1 : held - 1'b1;
    if (rst) begin
      head <= 0;
      tail <= 0;
      stored <= 0;
      front_head <= 0;
      front_tail <= 0;
      free <= 4;
      held <= 0;
      arrives <= 1'b0;
    end
  end
endmodule
