/** A field made from the JSON Schema of a parameter. */

import { useEffect, useState } from "preact/hooks";

import type { JsonSchema } from "../../api/types";
import { parseValue, showValue } from "../../lib/recipe";

interface SchemaFieldProps {
  name: string;
  schema: JsonSchema;
  value: unknown;
  onChange: (value: unknown) => void;
}

export function SchemaField({ name, schema, value, onChange }: SchemaFieldProps) {
  const choices = choicesOf(schema);
  const fallback = showValue(schema.default);
  const help = [schema.description, bounds(schema)].filter(Boolean).join(" ");
  return (
    <label class="field">
      <span>{name}</span>
      {choices ? (
        <select
          class="input"
          value={showValue(value)}
          onChange={(event) => onChange(parseValue(event.currentTarget.value))}
        >
          <option value="">{fallback ? `default: ${fallback}` : "the method's default"}</option>
          {choices.map((choice) => (
            <option key={choice} value={choice}>
              {choice}
            </option>
          ))}
        </select>
      ) : (
        <ValueInput value={value} placeholder={fallback} onChange={onChange} />
      )}
      {help && <small>{help}</small>}
    </label>
  );
}

/** Numbers, words and one-line YAML, such as a gradient `[0.2, 0.5]`; taken in when it is left. */
function ValueInput({
  value,
  placeholder,
  onChange,
}: Pick<SchemaFieldProps, "value" | "onChange"> & { placeholder: string }) {
  const shown = showValue(value);
  const [text, setText] = useState(shown);
  useEffect(() => setText(shown), [shown]);
  return (
    <input
      class="input mono"
      value={text}
      placeholder={placeholder}
      onInput={(event) => setText(event.currentTarget.value)}
      onChange={() => onChange(parseValue(text))}
    />
  );
}

/** The values of an enumeration, if the schema is nothing else (null is the default's name). */
function choicesOf(schema: JsonSchema): string[] | null {
  if (schema.type === "boolean") return ["true", "false"];
  if (schema.enum) return schema.enum.map(showValue);
  const kinds = (schema.anyOf ?? []).filter((kind) => kind.type !== "null");
  const only = kinds[0];
  return kinds.length === 1 && only ? choicesOf(only) : null;
}

function bounds(schema: JsonSchema): string {
  const parts = [
    schema.minimum !== undefined && `at least ${schema.minimum}`,
    schema.exclusiveMinimum !== undefined && `above ${schema.exclusiveMinimum}`,
    schema.maximum !== undefined && `at most ${schema.maximum}`,
    schema.exclusiveMaximum !== undefined && `below ${schema.exclusiveMaximum}`,
  ].filter(Boolean);
  return parts.length > 0 ? `(${parts.join(", ")})` : "";
}
