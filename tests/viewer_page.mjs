// A page in headless Chromium that does what it is told, a line of JSON each, on stdin: ["drag", x0, y0, x1, y1], ["press", "Pause"], ...
import {createInterface} from "node:readline";

const [playwright, executablePath, url, width, height] = process.argv.slice(2);
const {chromium} = await import(playwright);
const args = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"];
const browser = await chromium.launch({executablePath, args});
const page = await browser.newPage({viewport: {width: Number(width), height: Number(height)}});
const strangers = [], errors = [];
page.on("request", request => {
    const address = new URL(request.url());
    if (["http:", "https:", "ws:", "wss:"].includes(address.protocol) && address.host !== new URL(url).host) strangers.push(request.url());
});
page.on("pageerror", error => errors.push(error.message));

const doings = {
    screenshot: path => page.screenshot({path}).then(() => null),
    press: name => page.getByRole("button", {name, exact: true}).dispatchEvent("click"),
    text: () => page.evaluate(() => document.body.innerText),
    strangers: () => strangers,
    errors: () => errors,
    async drag(x0, y0, x1, y1) {
        await page.mouse.move(x0, y0);
        await page.mouse.down();
        await page.mouse.move(x1, y1, {steps: 4});
        await page.mouse.up();
    },
};

const answer = value => process.stdout.write(JSON.stringify(value ?? null) + "\n");
await page.goto(url);
await page.locator("canvas").first().waitFor();
answer("ready");
for await (const line of createInterface({input: process.stdin})) {
    const [name, ...given] = JSON.parse(line);
    answer(await doings[name](...given));
}
await browser.close();
