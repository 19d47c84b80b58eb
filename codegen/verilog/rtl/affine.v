// y = clamp(round_half_even((x * multiplier + offset) / 2^SHIFT)), with multipliers per channel and offsets per channel or element.
module affine #(
    parameter PE = 1,
    parameter X_BITS = 8,
    parameter X_SIGNED = 1,
    parameter SCALE = 1,       // multiply; MULTIPLIED cycles
    parameter MULTIPLIED = 3,  // of multiply.v
    parameter SCALES = 1,      // words of multipliers, repeated
    parameter M_BITS = 16,     // signed
    parameter ADD = 1,         // add; 1 cycle
    parameter OFFSETS = 1,     // words of offsets, repeated
    parameter Q_BITS = 24,     // the sum, signed
    parameter SHIFT = 0,
    parameter SCALED = 2,      // cycles of requantize.v
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127,
    parameter DEPTH = 2,
    parameter MULTIPLIERS = "multipliers.hex",
    parameter OFFSET = "offset.hex"
) (
    input clk,
    input rst,
    input s_valid,
    output s_ready,
    input [PE*X_BITS-1:0] s_data,
    output m_valid,
    input m_ready,
    output [PE*Y_BITS-1:0] m_data
);
  localparam LATE = SCALE ? MULTIPLIED : 1;  // cycles from a step to the fetch of its offset
  localparam OUT = 1 + (SCALE ? MULTIPLIED : 0) + ADD + SCALED;
  localparam MB = SCALES > 1 ? $clog2(SCALES) : 1;
  localparam OB = OFFSETS > 1 ? $clog2(OFFSETS) : 1;

  reg [PE*M_BITS-1:0] multipliers[0:SCALES-1];
  reg [PE*Q_BITS-1:0] offsets[0:OFFSETS-1];
  reg [MB-1:0] scale_index;
  reg [OB-1:0] offset_index;
  reg [PE*X_BITS-1:0] x;
  reg [PE*M_BITS-1:0] m;
  reg [PE*Q_BITS-1:0] o;
  reg [OUT:1] valid;
  wire room;
  wire go = s_valid & s_ready;
  wire adds = SCALE ? valid[LATE] : go;
  assign s_ready = room;
  initial if (SCALE) $readmemh(MULTIPLIERS, multipliers);
  initial if (ADD) $readmemh(OFFSET, offsets);

  always @(posedge clk) begin
    valid <= {valid, go};
    x <= s_data;
    m <= multipliers[scale_index];
    o <= offsets[offset_index];
    if (go) scale_index <= scale_index == SCALES - 1 ? {MB{1'b0}} : scale_index + 1'b1;
    if (adds) offset_index <= offset_index == OFFSETS - 1 ? {OB{1'b0}} : offset_index + 1'b1;
    if (rst) begin
      valid <= 0;
      scale_index <= 0;
      offset_index <= 0;
    end
  end

  wire [PE*Y_BITS-1:0] y;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : pe
      wire signed [X_BITS:0] xs = {X_SIGNED ? x[p*X_BITS+X_BITS-1] : 1'b0, x[p*X_BITS+:X_BITS]};
      wire signed [M_BITS-1:0] ms = m[p*M_BITS+:M_BITS];
      wire signed [Q_BITS-1:0] os = o[p*Q_BITS+:Q_BITS];
      wire signed [Q_BITS-1:0] scaled, total;
      if (SCALE) begin : scale
        multiply #(
            .A_BITS(X_BITS + 1),
            .B_BITS(M_BITS),
            .P_BITS(Q_BITS)
        ) unit (
            .clk(clk),
            .a(xs),
            .b(ms),
            .p(scaled)
        );
      end else begin : keep
        assign scaled = xs;
      end
      if (ADD) begin : add
        reg signed [Q_BITS-1:0] r;
        always @(posedge clk) r <= scaled + os;
        assign total = r;
      end else begin : bare
        assign total = scaled;
      end
      requantize #(
          .A_BITS(Q_BITS),
          .MULTIPLY(0),
          .M_BITS(1),
          .P_BITS(Q_BITS),
          .SHIFT(SHIFT),
          .ROUND(ROUND),
          .Y_BITS(Y_BITS),
          .CLAMP_LOW(CLAMP_LOW),
          .CLAMP_HIGH(CLAMP_HIGH),
          .LOW(LOW),
          .HIGH(HIGH)
      ) out (
          .clk(clk),
          .a(total),
          .m(1'b0),
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
      .reserve(go),
      .push(valid[OUT]),
      .push_data(y),
      .m_valid(m_valid),
      .m_ready(m_ready),
      .m_data(m_data)
  );
endmodule
