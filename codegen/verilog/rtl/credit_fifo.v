// The output buffer of a unit whose pipeline never stops. A step that will push later reserves an entry when it starts, and
// starts only while there is `room`: what is in flight always finds a place. An entry is free again when it is popped.
//
// A word is offered a cycle after it was pushed; 2 cycles later where there are more entries than 64, see deep_fifo.v.
module credit_fifo #(
    parameter WIDTH = 8,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    output room,
    input reserve,
    input push,
    input [WIDTH-1:0] push_data,
    output m_valid,
    input m_ready,
    output [WIDTH-1:0] m_data
);
  localparam POINTER = DEPTH > 1 ? $clog2(DEPTH) : 1;
  localparam COUNT = $clog2(DEPTH + 1);
  localparam [POINTER-1:0] LAST = DEPTH - 1;

  reg [COUNT-1:0] free;
  wire pop = m_valid & m_ready;
  assign room = free != 0;
  always @(posedge clk) begin
    if (reserve != pop) free <= pop ? free + 1'b1 : free - 1'b1;
    if (rst) free <= DEPTH[COUNT-1:0];
  end

  generate
    if (DEPTH > 64) begin : deep
      deep_fifo #(
          .WIDTH(WIDTH),
          .DEPTH(DEPTH)
      ) words (
          .clk(clk),
          .rst(rst),
          .push(push),
          .push_data(push_data),
          .m_valid(m_valid),
          .m_ready(m_ready),
          .m_data(m_data)
      );
    end else begin : shallow
      reg [WIDTH-1:0] memory[0:DEPTH-1];
      reg [POINTER-1:0] head, tail;
      reg [COUNT-1:0] held;
      assign m_valid = held != 0;
      assign m_data = memory[tail];
      always @(posedge clk) begin
        if (push) begin
          memory[head] <= push_data;
          head <= head == LAST ? {POINTER{1'b0}} : head + 1'b1;
        end
        if (pop) tail <= tail == LAST ? {POINTER{1'b0}} : tail + 1'b1;
        if (push != pop) held <= push ? held + 1'b1 : held - 1'b1;
        if (rst) begin
          head <= 0;
          tail <= 0;
          held <= 0;
        end
      end
    end
  endgenerate

`ifndef SYNTHESIS
  reg [COUNT-1:0] entries;
  always @(posedge clk) begin
    entries <= entries + push - pop;
    if (rst) entries <= 0;
    else if (push && !pop && entries == DEPTH[COUNT-1:0]) begin
      $display("%m: overflow");
      $finish;
    end
  end
`endif
endmodule
