// y = clamp(round_half_even(a * m / 2^SHIFT), LOW, HIGH). Parts that do nothing take no cycle and no logic:
// the cycles of multiply.v to multiply (MULTIPLY 1) or 2 to shift left by m (MULTIPLY 2), ROUND to round (0 if SHIFT is 0, else 1, or 2 for a shorter path), 1 to clamp (CLAMP_LOW or CLAMP_HIGH).
module requantize #(
    parameter A_BITS = 16,
    parameter MULTIPLY = 1,
    parameter M_BITS = 16,  // signed, or places
    parameter P_BITS = 32,  // a * m, signed
    parameter SHIFT = 16,
    parameter ROUND = 1,
    parameter Y_BITS = 8,
    parameter CLAMP_LOW = 1,
    parameter CLAMP_HIGH = 1,
    parameter signed [31:0] LOW = -128,
    parameter signed [31:0] HIGH = 127
) (
    input clk,
    input signed [A_BITS-1:0] a,
    input signed [M_BITS-1:0] m,
    output [Y_BITS-1:0] y
);
  localparam R_BITS = P_BITS - SHIFT + 1;  // after rounding

  wire signed [P_BITS-1:0] scaled;
  wire signed [R_BITS-1:0] rounded;

  generate
    if (MULTIPLY == 2) begin : power
      reg signed [A_BITS-1:0] a_r;
      reg [M_BITS-1:0] m_r;
      reg signed [P_BITS-1:0] r;
      always @(posedge clk) begin
        a_r <= a;
        m_r <= m;
        r <= a_r <<< m_r;
      end
      assign scaled = r;
    end else if (MULTIPLY) begin : multiply
      multiply #(
          .A_BITS(A_BITS),
          .B_BITS(M_BITS),
          .P_BITS(P_BITS)
      ) unit (
          .clk(clk),
          .a(a),
          .b(m),
          .p(scaled)
      );
    end else begin : keep
      assign scaled = a;
    end

    if (SHIFT > 0) begin : round
      wire signed [P_BITS-SHIFT-1:0] kept = scaled[P_BITS-1:SHIFT];
      wire half = scaled[SHIFT-1];
      wire below;
      if (SHIFT > 1) begin : sticky
        assign below = |scaled[SHIFT-2:0];
      end else begin : none
        assign below = 1'b0;
      end
      wire up = half & (below | kept[0]);
      reg signed [R_BITS-1:0] r;
      if (ROUND == 2) begin : two
        reg signed [P_BITS-SHIFT-1:0] kept_r;
        reg up_r;
        always @(posedge clk) begin
          kept_r <= kept;
          up_r <= up;
          r <= kept_r + $signed({1'b0, up_r});
        end
      end else begin : one
        always @(posedge clk) r <= kept + $signed({1'b0, up});
      end
      assign rounded = r;
    end else begin : exact
      assign rounded = scaled;
    end

    if (CLAMP_LOW || CLAMP_HIGH) begin : clamp
      // A bound of all ones (zeros below the sign) needs a look at the upper bits only.
      localparam H = $clog2(HIGH + 1);
      localparam L = LOW == 0 ? 0 : $clog2(-LOW);
      wire negative = rounded[R_BITS-1];
      wire over, under;
      if (!CLAMP_HIGH) begin : no_over
        assign over = 1'b0;
      end else if (HIGH >= 0 && HIGH + 1 == (1 << H)) begin : over_bits
        assign over = !negative && |rounded[R_BITS-1:H];
      end else begin : over_compare
        assign over = rounded > HIGH;
      end
      if (!CLAMP_LOW) begin : no_under
        assign under = 1'b0;
      end else if (LOW <= 0 && (LOW == 0 || -LOW == (1 << L))) begin : under_bits
        assign under = negative && (LOW == 0 || !(&rounded[R_BITS-1:L]));
      end else begin : under_compare
        assign under = rounded < LOW;
      end
      reg [Y_BITS-1:0] r;
      always @(posedge clk) r <= over ? HIGH[Y_BITS-1:0] : under ? LOW[Y_BITS-1:0] : rounded[Y_BITS-1:0];
      assign y = r;
    end else begin : narrow
      assign y = rounded[Y_BITS-1:0];
    end
  endgenerate
endmodule
