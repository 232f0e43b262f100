// What the trained models of the figures share: the weights of a file, a matrix times a vector, a sum, and a layer norm.

/** A number of 16 bits (half precision) as JavaScript knows numbers. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1, power = (bits >> 10) & 31, rest = bits & 1023;
  if (power === 31) return rest ? NaN : sign * Infinity;
  return sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
}

const KINDS = { F32: Float32Array, I8: Int8Array, F16: Uint16Array, I64: BigInt64Array };

/** What a safetensors file holds: its metadata, and its tensors by name, {shape, data}. Rows of integers are multiplied
 * by their scales. */
export function tensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const read = ({ dtype, data_offsets: [start, end] }) => {
    const numbers = new KINDS[dtype](buffer.slice(8 + size + start, 8 + size + end));
    return dtype === "F16" ? Float32Array.from(numbers, half) : dtype === "I64" ? Int32Array.from(numbers, Number) : numbers;
  };
  const weights = {};
  for (const [name, one] of Object.entries(header)) {
    if (name === "__metadata__" || name.endsWith(".scale")) continue;
    const scale = header[`${name}.scale`] && read(header[`${name}.scale`]), numbers = read(one);
    const row = numbers.length / one.shape[0];
    weights[name] = { shape: one.shape, data: scale ? Float32Array.from(numbers, (x, i) => x * scale[Math.floor(i / row)]) : numbers };
  }
  return { metadata: header.__metadata__, weights };
}

/** What make gives of the file of weights, fetched when the button is pressed. Where it does not come, nothing: the
 * sentence says so, and the button can be pressed again. */
export async function fetched(url, button, said, make) {
  button.disabled = true;
  said.say("Loading…");
  try {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`${answer.status}`);
    return make(tensors(await answer.arrayBuffer()));
  } catch (fault) {
    button.disabled = false;
    said.say("The weights could not be loaded. Try again.");
  }
}

/** A matrix times a vector. A matrix of more than two axes is read as rows of all that follows the first. */
export function times({ shape: [rows], data }, x) {
  const y = new Float64Array(rows);
  for (let i = 0, at = 0; i < rows; i++) {
    let sum = 0;
    for (let j = 0; j < x.length; j++) sum += data[at++] * x[j];
    y[i] = sum;
  }
  return y;
}

/** The sum of two vectors. */
export const plus = (a, b) => a.map((x, i) => x + b[i]);

/** A layer norm: mean 0 and variance 1, then a weight and a bias for each number. */
export function normed(x, { weight, bias }) {
  const mean = x.reduce((a, b) => a + b, 0) / x.length;
  const spread = Math.sqrt(x.reduce((sum, a) => sum + (a - mean) ** 2, 0) / x.length + 1e-5);
  return x.map((a, i) => ((a - mean) / spread) * weight.data[i] + bias.data[i]);
}
