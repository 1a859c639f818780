import "./styles/base.css";
import "./styles/parts.css";
import "./styles/pages.css";

import { render } from "preact";

import { App } from "./App";
import { applyTheme } from "./lib/theme";

applyTheme();
render(<App />, document.getElementById("app")!);
