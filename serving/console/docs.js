// A readable page from this server's own OpenAPI description.

const make = (tag, content = [], attributes = {}) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...[content].flat());
  return made;
};

// What stands between backticks is code.
const prose = (text) =>
  String(text).split("`").map((part, index) => (index % 2 ? make("code", part) : part));

const description = await (await fetch("openapi.json")).json();

const resolve = (schema) =>
  schema?.$ref
    ? schema.$ref.slice(2).split("/").reduce((part, name) => part[name], description)
    : (schema ?? {});

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

const table = (rows) =>
  make("table", make("tbody", rows.map(([name, text]) =>
    make("tr", [make("td", make("code", name)), make("td", prose(text))]))));

// The fields of an object, those of objects inside it under dotted names.
function fields(schema, prefix = "") {
  if (schema.anyOf) return schema.anyOf.flatMap((option) => fields(option, prefix));
  return Object.entries(resolve(schema).properties ?? {}).flatMap(([name, field]) => {
    const inner = field.items ?? field;
    const label = `${prefix}${name}${field.items ? "[]" : ""}`;
    const text = [typeOf(field), field.description].filter(Boolean).join(": ");
    return [[label, text], ...fields(inner, `${label}.`)];
  });
}

function describe(method, path, operation) {
  const parts = [
    make("h2", [make("span", method.toUpperCase(), { className: "method" }), make("code", path)]),
    make("p", operation.summary ?? ""),
  ];
  if (operation.description) parts.push(make("p", prose(operation.description)));
  const parameters = (operation.parameters ?? []).map(({ name, in: place, schema, description: text }) =>
    [name, [`in the ${place}`, typeOf(schema), text].filter(Boolean).join(": ")]);
  if (parameters.length) parts.push(make("h3", "Parameters"), table(parameters));
  if (operation.requestBody) {
    parts.push(make("h3", "Body"), make("p", Object.keys(operation.requestBody.content).join(", ")));
  }
  const good = operation.responses["200"]?.content?.["application/json"]?.schema;
  if (good) parts.push(make("h3", "Answer"), table(fields(good)));
  const errors = Object.entries(operation.responses)
    .filter(([status]) => status !== "200")
    .map(([status, { description: text }]) => [status, text]);
  if (errors.length) parts.push(make("h3", "Errors"), table(errors));
  return make("section", parts, { className: "panel" });
}

const example = new URL("v1/CATEGORY/inspect", document.baseURI);
document.getElementById("example").textContent =
  `curl --data-binary @part.png ${example}\n` +
  `curl --data-binary @part.png -H 'Accept: image/png' -o overlay.png ${example}`;
document.getElementById("token-note").textContent =
  (await fetch("v1")).status === 401
    ? "This fleet asks for a token: add -H 'Authorization: Bearer TOKEN'."
    : "";
document.getElementById("operations").replaceChildren(
  ...Object.entries(description.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]) => describe(method, path, operation))),
);
