/**
 * The YAML editor. It lives in a shadow root: there CodeMirror adopts constructed style sheets,
 * which the content security policy allows, instead of writing style elements, which it does not.
 */

import { defaultKeymap, history, historyKeymap, indentWithTab } from "@codemirror/commands";
import { yaml } from "@codemirror/lang-yaml";
import { HighlightStyle, bracketMatching, indentOnInput, syntaxHighlighting } from "@codemirror/language";
import { type Diagnostic, lintGutter, setDiagnostics } from "@codemirror/lint";
import { EditorState } from "@codemirror/state";
import { EditorView, drawSelection, highlightActiveLine, keymap, lineNumbers } from "@codemirror/view";
import { tags } from "@lezer/highlight";
import { useEffect, useRef } from "preact/hooks";

export type { Diagnostic };

interface EditorProps {
  label: string;
  /** What it begins with; from then on the editor's own text counts. */
  text: string;
  diagnostics: Diagnostic[];
  onChange: (text: string) => void;
}

export function Editor({ label, text, diagnostics, onChange }: EditorProps) {
  const place = useRef<HTMLDivElement>(null);
  const view = useRef<EditorView | null>(null);
  const changed = useRef(onChange);
  changed.current = onChange;

  useEffect(() => {
    const element = place.current!;
    const root = element.shadowRoot ?? element.attachShadow({ mode: "open" });
    const editor = new EditorView({
      root,
      parent: root,
      state: EditorState.create({ doc: text, extensions: extensions(label, changed) }),
    });
    view.current = editor;
    return () => {
      editor.destroy();
      view.current = null;
    };
  }, []);

  useEffect(() => {
    const editor = view.current;
    if (!editor) return;
    const length = editor.state.doc.length;
    const inside = diagnostics.map((item) => ({
      ...item,
      from: Math.min(item.from, length),
      to: Math.min(Math.max(item.to, item.from), length),
    }));
    editor.dispatch(setDiagnostics(editor.state, inside));
  }, [diagnostics]);

  return <div ref={place} class="editor" />;
}

function extensions(label: string, changed: { current: (text: string) => void }) {
  return [
    lineNumbers(),
    history(),
    drawSelection(),
    indentOnInput(),
    bracketMatching(),
    highlightActiveLine(),
    yaml(),
    syntaxHighlighting(HIGHLIGHT),
    lintGutter(),
    // Escape, then Tab, leaves the editor: nobody is caught in it.
    keymap.of([...defaultKeymap, ...historyKeymap, indentWithTab]),
    EditorView.contentAttributes.of({ "aria-label": label }),
    EditorView.lineWrapping,
    EditorView.updateListener.of((update) => {
      if (update.docChanged) changed.current(update.state.doc.toString());
    }),
    THEME,
  ];
}

const THEME = EditorView.theme({
  "&": { fontSize: "13px", color: "var(--text)", backgroundColor: "var(--surface)", height: "100%" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55", minHeight: "340px" },
  ".cm-content": { caretColor: "var(--text)" },
  ".cm-cursor": { borderLeftColor: "var(--text)" },
  ".cm-gutters": { backgroundColor: "var(--surface)", color: "var(--muted)", border: "none" },
  ".cm-activeLine": { backgroundColor: "color-mix(in srgb, var(--raised) 60%, transparent)" },
  "&.cm-focused .cm-selectionBackground, .cm-selectionBackground": { backgroundColor: "var(--accent-soft)" },
  ".cm-lintRange-error": { backgroundImage: "none", borderBottom: "2px dotted var(--failed)" },
  ".cm-lint-marker-error": {
    content: "normal",
    width: "9px",
    height: "9px",
    margin: "5px 2px",
    backgroundColor: "var(--failed)",
    transform: "rotate(45deg)",
  },
  ".cm-tooltip": {
    backgroundColor: "var(--surface)",
    color: "var(--text)",
    border: "1px solid var(--line-strong)",
    maxWidth: "520px",
  },
});

const HIGHLIGHT = HighlightStyle.define([
  { tag: [tags.propertyName, tags.definition(tags.propertyName)], color: "var(--accent)" },
  { tag: tags.comment, color: "var(--muted)" },
  { tag: [tags.number, tags.bool, tags.null], color: "var(--publishing)" },
]);
