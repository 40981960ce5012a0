// Conversations, kept in this browser: IndexedDB, or memory where the browser has none for us.

const NAME = "ruvon";
const memory = new Map();
let opened = null;

function open() {
  opened ??= new Promise((resolve) => {
    const asked = indexedDB.open(NAME, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("conversations", { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  });
  return opened;
}

async function run(mode, work) {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const asked = work(database.transaction("conversations", mode).objectStore("conversations"));
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/** All conversations, the latest first. */
export async function all() {
  const found = (await run("readonly", (store) => store.getAll())) || [...memory.values()];
  return found.sort((a, b) => b.changed - a.changed);
}

export async function save(conversation) {
  conversation.changed = Date.now();
  memory.set(conversation.id, conversation);
  await run("readwrite", (store) => store.put(conversation));
}

export async function remove(id) {
  memory.delete(id);
  await run("readwrite", (store) => store.delete(id));
}

// ------------------------------------------------------------------ a conversation is a tree

/** { id, title, changed, nodes: { id: { id, parent, role, content, ... } }, leaf, next } */
export function create() {
  return {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`,
    title: "",
    changed: 0,
    nodes: {},
    leaf: null,
    next: 1,
  };
}

/** Add a message below another and go there. */
export function append(conversation, parent, fields) {
  const node = { id: conversation.next++, parent, ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  if (!conversation.title && fields.role === "user") conversation.title = fields.content.trim().slice(0, 60);
  return node;
}

/** The messages from the first to the leaf. */
export function path(conversation, leaf = conversation.leaf) {
  const found = [];
  for (let id = leaf; id !== null && id !== undefined; id = conversation.nodes[id].parent)
    found.unshift(conversation.nodes[id]);
  return found;
}

/** Those that answer the same message, oldest first; each begins a branch. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((other) => other.parent === node.parent)
    .sort((a, b) => a.id - b.id);
}

/** Go to a branch, and there to its latest end. */
export function follow(conversation, node) {
  let id = node.id;
  for (;;) {
    const below = Object.values(conversation.nodes).filter((other) => other.parent === id);
    if (!below.length) break;
    id = Math.max(...below.map((other) => other.id));
  }
  conversation.leaf = id;
}
