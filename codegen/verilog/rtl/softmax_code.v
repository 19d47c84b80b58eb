// How often e (a, BEATS beats per row) can be doubled and stay below sum / sqrt(2) (b, one beat per row): the code of the power of
// two nearest to e / sum. Bisection, one bit per cycle.
module softmax_code #(
    parameter PE = 1,
    parameter BEATS = 1,
    parameter E_BITS = 13,
    parameter S_BITS = 16,
    parameter BITS = 4,
    parameter DEPTH = 2
) (
    input clk,
    input rst,
    input a_valid,
    output a_ready,
    input [PE*E_BITS-1:0] a_data,
    input b_valid,
    output b_ready,
    input [S_BITS-1:0] b_data,
    output m_valid,
    input m_ready,
    output [PE*BITS-1:0] m_data
);
  localparam OUT = 3 + BITS;
  localparam B = BEATS > 1 ? $clog2(BEATS) : 1;
  localparam W = S_BITS + 15;                // of the sum with 15 more bits
  localparam G = E_BITS + 16 + (1 << BITS);  // of e * sqrt(2), doubled
  localparam C = G > W ? G : W;
  reg [B-1:0] beat;
  reg [OUT:1] valid;
  reg [S_BITS-1:0] held;
  wire room;
  wire first = beat == 0;
  wire go = a_valid & room & (b_valid | ~first);
  assign a_ready = room & (b_valid | ~first);
  assign b_ready = room & a_valid & first;

  reg [W-1:0] whole, whole_late;  // of the step before, and the one before that
  always @(posedge clk) begin
    valid <= {valid, go};
    whole <= {first ? b_data : held, 15'd0};
    whole_late <= whole;
    if (go) begin
      beat <= beat == BEATS - 1 ? {B{1'b0}} : beat + 1'b1;
      if (first) held <= b_data;
    end
    if (rst) begin
      beat <= 0;
      valid <= 0;
    end
  end

  wire [PE*BITS-1:0] y;
  genvar p, i;
  generate
    for (i = 0; i <= BITS; i = i + 1) begin : sum
      reg [W-1:0] r;
      if (i == 0) begin : start
        always @(posedge clk) r <= whole_late;
      end else begin : later
        always @(posedge clk) r <= sum[i-1].r;
      end
    end
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [E_BITS+17:0] scaled;  // e * sqrt(2)
      multiply #(
          .A_BITS(E_BITS + 1),
          .B_BITS(17),
          .P_BITS(E_BITS + 18)
      ) unit (
          .clk(clk),
          .a({1'b0, a_data[p*E_BITS+:E_BITS]}),
          .b(17'sd46341),
          .p(scaled)
      );
      for (i = 0; i <= BITS; i = i + 1) begin : bit_
        wire [C-1:0] grown;
        wire [BITS-1:0] code;
        if (i == 0) begin : start
          assign grown = scaled[E_BITS+15:0];
          assign code = 0;
        end else begin : later
          reg [C-1:0] grown_r;
          reg [BITS-1:0] code_r;
          assign grown = grown_r;
          assign code = code_r;
          localparam D = 1 << (BITS - i);  // doublings this bit stands for
          wire below = (bit_[i-1].grown << (D - 1)) < {{C - W{1'b0}}, sum[i-1].r};
          always @(posedge clk) begin
            grown_r <= below ? bit_[i-1].grown << D : bit_[i-1].grown;
            code_r <= {bit_[i-1].code, below};
          end
        end
      end
      assign y[p*BITS+:BITS] = bit_[BITS].code;
    end
  endgenerate

  credit_fifo #(
      .WIDTH(PE * BITS),
      .DEPTH(DEPTH)
  ) fifo (
      .clk(clk),
      .rst(rst),
      .room(room),
      .reserve(go),
      .push(valid[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
