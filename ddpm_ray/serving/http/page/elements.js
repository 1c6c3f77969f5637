// Elements of the page: finding and making them, and its messages.

/** The first element that a CSS selector matches, or null. */
export const find = (selector) => document.querySelector(selector);

/** The form with the settings of a request. */
export const form = find("#settings");

/** A new element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Have screen readers say a text. */
export function announce(text) {
  find("#live").textContent = text;
}

/** Show a message above everything, or none; `offersToken`: with a button to enter a token. */
export function notify(text, offersToken = false) {
  const notice = find("#notice");
  notice.hidden = !text;
  notice.firstElementChild.textContent = text;
  notice.lastElementChild.hidden = !offersToken;
}
