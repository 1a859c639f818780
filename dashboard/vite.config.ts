import { defineConfig } from "vite";

// Addresses of assets are relative, so that the pages work under any path prefix: the server
// names the prefix in <base>. Nothing is inlined: the content security policy allows no data: code.
export default defineConfig({
  base: "./",
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../service/dashboard/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  test: { include: ["tests/**/*.test.ts"] },
} as Parameters<typeof defineConfig>[0]);
