// What test_node.py asks of turbochain.mjs: a line of JSON in, a line of JSON out; values are base64.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { Bundle, Generator, Pipeline, Tokenizer } from "./turbochain.mjs";

const pipes = new Map();

const ANSWERS = {
  // Successive draws of one generator; a seed is a number, or a string for a BigInt.
  noise({ seed, counts }) {
    const generator = new Generator(seedOf(seed));
    return counts.map((count) => base64(generator.randn(count)));
  },
  async ids({ file, entry, prompts }) {
    const tokenizer = await Tokenizer.read(await readFile(file), entry);
    return prompts.map((prompt) => base64(tokenizer.encode(prompt)));
  },
  async load({ pipe, url, tasks }) {
    const told = [];
    pipes.set(pipe, await Pipeline.load(url, { tasks, progress: (progress) => told.push(progress) }));
    return { tasks: pipes.get(pipe).tasks, backend: pipes.get(pipe).backend, told };
  },
  // A call; `end`: after how many graphs it is cancelled.
  async draw({ pipe, prompt, options, image, end }) {
    const stages = [];
    const ending = new AbortController();
    const observe = ({ stage }) => stages.push(stage) === end && ending.abort();
    const more = image ? { image: { ...image, data: Buffer.from(image.data, "base64") } } : {};
    if ("seed" in options) more.seed = seedOf(options.seed);
    const picture = await pipes.get(pipe)(prompt, { ...options, ...more, observe, signal: ending.signal });
    return { width: picture.width, height: picture.height, data: base64(picture.data), seed: `${picture.seed}`, stages };
  },
  async read({ url, file }) {
    const told = [];
    const bundle = await Bundle.open(url);
    await bundle.read(file, (loaded) => told.push(loaded));
    return told.at(-1);
  },
};

const seedOf = (seed) => (typeof seed === "string" ? BigInt(seed) : seed);
const base64 = ({ buffer, byteOffset, byteLength }) => Buffer.from(buffer, byteOffset, byteLength).toString("base64");

for await (const line of createInterface({ input: process.stdin })) {
  const { ask, ...what } = JSON.parse(line);
  const answer = await (async () => ANSWERS[ask](what))().then(
    (value) => ({ value }),
    (error) => ({ error: error.name, message: error.message }),
  );
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
