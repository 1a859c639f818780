import type { Method } from "../../api/types";
import { type Path, type RecipeText, showValue, valueAt, withValue } from "../../lib/recipe";
import { Icon } from "../../ui/icons";
import { SchemaField } from "./SchemaField";

const DTYPES = ["bfloat16", "float16", "float32"];

interface RecipeFormProps {
  recipe: RecipeText;
  methods: Method[];
  onChange: (text: string) => void;
}

/** The recipe as fields. What a form cannot show stays in the text as it is. */
export function RecipeForm({ recipe, methods, onChange }: RecipeFormProps) {
  if (!recipe.isMapping) {
    return <p class="notice">The text is not a recipe's YAML yet; mend it there, and the form is back.</p>;
  }
  const set = (path: Path, value: unknown) => onChange(withValue(recipe, path, value));
  const name = showValue(valueAt(recipe, ["merge_method"]));
  const method = methods.find((item) => item.name === name);
  const parameters = Object.entries(method?.parameters.properties ?? {});
  return (
    <div class="stack form">
      <label class="field">
        <span>Method</span>
        <select
          class="input"
          value={name}
          onChange={(event) => set(["merge_method"], event.currentTarget.value || undefined)}
        >
          <option value="">choose one</option>
          {sorted(methods).map((item) => (
            <option key={item.name} value={item.name}>
              {item.title} ({item.name}){item.recommended ? ", start here" : ""}
            </option>
          ))}
        </select>
        {method && (
          <small>
            {method.summary} {method.source}
          </small>
        )}
      </label>
      {(method?.needs_base ?? true) && (
        <TextField
          label="Base model"
          value={showValue(valueAt(recipe, ["base_model"]))}
          placeholder="s3://models/base or a folder"
          onChange={(value) => set(["base_model"], value)}
        />
      )}
      <Experts recipe={recipe} method={method} set={set} />
      {parameters.length > 0 && (
        <fieldset>
          <legend>Parameters</legend>
          <div class="fields">
            {parameters.map(([key, schema]) => (
              <SchemaField
                key={key}
                name={key}
                schema={schema}
                value={valueAt(recipe, ["parameters", key])}
                onChange={(value) => set(["parameters", key], value)}
              />
            ))}
          </div>
        </fieldset>
      )}
      <label class="field">
        <span>dtype of the merged model</span>
        <select
          class="input"
          value={showValue(valueAt(recipe, ["dtype"]))}
          onChange={(event) => set(["dtype"], event.currentTarget.value || undefined)}
        >
          <option value="">as in the base model</option>
          {DTYPES.map((dtype) => (
            <option key={dtype}>{dtype}</option>
          ))}
        </select>
      </label>
    </div>
  );
}

function sorted(methods: Method[]): Method[] {
  return [...methods].sort((a, b) => Number(b.recommended ?? false) - Number(a.recommended ?? false));
}

interface ExpertsProps {
  recipe: RecipeText;
  method: Method | undefined;
  set: (path: Path, value: unknown) => void;
}

function Experts({ recipe, method, set }: ExpertsProps) {
  const value = valueAt(recipe, ["models"]);
  const models = Array.isArray(value) ? (value as unknown[]) : [];
  const parameters = Object.entries(method?.expert_parameters.properties ?? {});
  return (
    <fieldset>
      <legend>Experts</legend>
      <div class="stack">
        {models.map((model, index) => (
          <div key={index} class="expert">
            <div class="row nowrap">
              <TextField
                label={`Expert ${index + 1}`}
                value={addressOf(model)}
                placeholder="s3://models/expert or a folder"
                onChange={(address) => set(["models", index, "model"], address ?? "")}
              />
              <button
                type="button"
                class="button quiet"
                aria-label={`Remove expert ${index + 1}`}
                onClick={() => set(["models"], models.filter((_, other) => other !== index))}
              >
                ×
              </button>
            </div>
            {parameters.length > 0 && (
              <div class="fields">
                {parameters.map(([key, schema]) => (
                  <SchemaField
                    key={key}
                    name={key}
                    schema={{ ...schema, description: "" }}
                    value={valueAt(recipe, ["models", index, "parameters", key])}
                    onChange={(item) => set(["models", index, "parameters", key], item)}
                  />
                ))}
              </div>
            )}
          </div>
        ))}
        <p>
          <button type="button" class="button" onClick={() => set(["models"], [...models, { model: "" }])}>
            <Icon name="plus" /> Add an expert
          </button>
        </p>
      </div>
    </fieldset>
  );
}

function addressOf(model: unknown): string {
  const address = (model as { model?: unknown } | null)?.model;
  return typeof address === "string" ? address : showValue(address);
}

interface TextFieldProps {
  label: string;
  value: string;
  placeholder?: string;
  onChange: (value: string | undefined) => void;
}

export function TextField({ label, value, placeholder = "", onChange }: TextFieldProps) {
  return (
    <label class="field grow">
      <span>{label}</span>
      <input
        class="input mono"
        value={value}
        placeholder={placeholder}
        onInput={(event) => onChange(event.currentTarget.value.trim() || undefined)}
      />
    </label>
  );
}
