// Whisper's timestamps, by the rules of devices/runner/decode/timestamps.py.

export const STEP_SAMPLES = 320; // 0.02 s

export function isTimestamp(token, { timestamp_begin, timestamp_end }) {
  return timestamp_begin !== null && token >= timestamp_begin && (timestamp_end === null || token < timestamp_end);
}

export function logSumExp(values) {
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (most === -Infinity) return most;
  return most + Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
}

// Sets the scores of tokens that may not follow to -Infinity, in place.
export function forbid(scores, tokens, rules) {
  const begin = rules.timestamp_begin;
  const end = rules.timestamp_end ?? scores.length;
  const [text, stamps, added] = [scores.subarray(0, begin), scores.subarray(begin, end), scores.subarray(end)];
  const noText = () => [text, added].forEach((part) => part.fill(-Infinity));
  const most = (part) => part.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!tokens.length) {
    noText();
    if (rules.max_initial_timestamp_index !== null) stamps.fill(-Infinity, rules.max_initial_timestamp_index + 1);
    return;
  }
  const stamped = (token) => isTimestamp(token, rules);
  const afterStamp = stamped(tokens.at(-1));
  if (afterStamp && (tokens.length < 2 || stamped(tokens.at(-2)))) {
    stamps.fill(-Infinity);
    return;
  }
  if (afterStamp) {
    text.fill(-Infinity, 0, rules.eos);
    added.fill(-Infinity);
  }
  const last = tokens.findLast(stamped) ?? begin - 1;
  stamps.fill(-Infinity, 0, last - begin + (afterStamp ? 0 : 1));
  if (logSumExp(stamps) > Math.max(most(text), most(added))) noText();
}

// Returns the finished segments of a window as [begin, end, tokens] in steps, and the step at which
// the next window begins.
export function parts(tokens, rules, length) {
  const begin = rules.timestamp_begin;
  const stamped = tokens.map((token) => isTimestamp(token, rules));
  const pairs = [...tokens.keys()].filter((i) => i && stamped[i - 1] && stamped[i]);
  if (!pairs.length) {
    const start = stamped[0] ? tokens[0] - begin : 0;
    const stop = stamped.at(-1) && tokens.length > 1 ? tokens.at(-1) - begin : length;
    return [[[start, stop, tokens]], length];
  }
  const closed = stamped.at(-1) && !stamped.at(-2);
  const cuts = [0, ...pairs, ...(closed ? [tokens.length] : [])];
  const pieces = cuts.slice(1).map((cut, i) => tokens.slice(cuts[i], cut));
  const timed = pieces.map((piece) => [piece[0] - begin, piece.at(-1) - begin, piece]);
  return [timed, closed ? length : timed.at(-1)[1]];
}
