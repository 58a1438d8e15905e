// Runs the uses of one client one after another, and prints how each one went.

export const URL = process.env.EDGE_URL ?? "http://localhost:8002";
export const KEY = "any";
export const MODEL = "demo";
export const PROMPT = "How is the weather in Rome?";

export function check(condition, what) {
  if (!condition) throw new Error(`not as expected: ${JSON.stringify(what)}`);
}

export async function run(uses) {
  for (const [name, use] of Object.entries(uses)) {
    try {
      await use();
      console.log(`${name}: ok`);
    } catch (error) {
      console.log(`${name}: failed`);
      console.error(error);
      process.exitCode = 1;
    }
  }
}
